//! Decisions that a fuzz target takes from the bytes of its input, in order. Once all bytes are
//! used up, every further byte is zero.

/// The bytes of the input that are not used yet.
#[derive(Debug, Clone)]
pub struct Choices<'a>(pub &'a [u8]);

impl<'a> Choices<'a> {
    /// Takes a byte.
    pub fn byte(&mut self) -> u8 {
        match self.0.split_first() {
            Some((byte, rest)) => {
                self.0 = rest;
                *byte
            }
            None => 0,
        }
    }

    /// Takes two bytes as a little-endian number.
    pub fn short(&mut self) -> u16 {
        u16::from_le_bytes([self.byte(), self.byte()])
    }

    /// Takes a number below `end`, which is at most 256.
    pub fn below(&mut self, end: usize) -> usize {
        usize::from(self.byte()) % end
    }

    /// Picks an element of `list`, which has at most 256 elements.
    pub fn of<T: Copy>(&mut self, list: &[T]) -> T {
        list[self.below(list.len())]
    }

    /// Returns true in one of `times` cases. For `times` above 1 it returns false once all bytes
    /// are used up.
    pub fn rarely(&mut self, times: usize) -> bool {
        self.below(times) == times - 1
    }

    /// Takes a number that a reader may not expect: in half of the cases below 256, otherwise of 16
    /// bits or next to a power of two.
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

    /// Takes `count` bytes. Bytes that are missing are zero.
    pub fn bytes(&mut self, count: usize) -> Vec<u8> {
        let (taken, rest) = self.0.split_at(count.min(self.0.len()));
        self.0 = rest;
        let mut bytes = taken.to_vec();
        bytes.resize(count, 0);
        bytes
    }

    /// Takes all bytes that are left.
    pub fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.0)
    }
}
