//! Takes decisions from an input's bytes, one after the other. When they are used up, everything is
//! zero.

/// The bytes that are left.
#[derive(Debug, Clone)]
pub struct Choices<'a>(pub &'a [u8]);

impl<'a> Choices<'a> {
    /// The next byte.
    pub fn byte(&mut self) -> u8 {
        match self.0.split_first() {
            Some((byte, rest)) => {
                self.0 = rest;
                *byte
            }
            None => 0,
        }
    }

    /// The next two bytes as a number.
    pub fn short(&mut self) -> u16 {
        u16::from_le_bytes([self.byte(), self.byte()])
    }

    /// A number below `end`, which is at most 256.
    pub fn below(&mut self, end: usize) -> usize {
        usize::from(self.byte()) % end
    }

    /// One of a list.
    pub fn of<T: Copy>(&mut self, list: &[T]) -> T {
        list[self.below(list.len())]
    }

    /// True once in `times`, and never once the bytes are used up.
    pub fn rarely(&mut self, times: usize) -> bool {
        self.below(times) == times - 1
    }

    /// A number that somebody may have forgotten: mostly small, else near a power of two.
    pub fn number(&mut self) -> u64 {
        match self.below(4) {
            0 | 1 => u64::from(self.byte()),
            2 => u64::from(self.short()),
            _ => {
                let near = 1u64.checked_shl(u32::from(self.byte() % 65)).unwrap_or(0);
                near.wrapping_add(u64::from(self.byte() % 3)).wrapping_sub(1)
            }
        }
    }

    /// `count` bytes; the last ones are zero if there are too few.
    pub fn bytes(&mut self, count: usize) -> Vec<u8> {
        let (taken, rest) = self.0.split_at(count.min(self.0.len()));
        self.0 = rest;
        let mut bytes = taken.to_vec();
        bytes.resize(count, 0);
        bytes
    }

    /// All that is left.
    pub fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.0)
    }
}
