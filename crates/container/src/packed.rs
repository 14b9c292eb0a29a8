//! Small numbers as a stream of bits, the way Core ML packs its sub-byte types.
//!
//! Number i of b bits occupies bits [i b, (i + 1) b) of the stream, lowest bit first; bit k of the
//! stream is bit k % 8 of byte k / 8. The last byte is filled up with zeros. (coremltools:
//! `optimize/_utils.py`, `pack_elements_into_bits`.)

use std::ops::Range;

use rayon::prelude::*;
use squeeze_base::error::{Error, Result};
use squeeze_codebook::BitWidth;

/// Numbers of a few bits each, packed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Packed {
    bytes: Vec<u8>,
    bits: BitWidth,
    len: usize,
}

impl Packed {
    /// Packs `values`, on all threads.
    ///
    /// # Errors
    /// [`Error::Range`] if a value needs more bits.
    pub fn pack(values: &[u8], bits: BitWidth) -> Result<Self> {
        let all =
            values.par_chunks(PIECE).map(|values| values.iter().fold(0, |all, value| all | value)).reduce(|| 0, |a, b| a | b);
        if let Some(value) = values.iter().find(|value| all > bits.max_index() && **value > bits.max_index()) {
            return Err(Error::range("an index", value, format!("at most {} in {bits} bits", bits.max_index())));
        }
        let width = usize::from(bits.bits());
        let mut bytes = vec![0; byte_count(values.len(), bits).map_err(Error::Argument)?];
        // Eight numbers fill whole bytes.
        let pieces = bytes.par_chunks_mut(PIECE / 8 * width).zip(values.par_chunks(PIECE));
        pieces.for_each(|(bytes, values)| match bits {
            BitWidth::One => pack_bits::<1>(values, bytes),
            BitWidth::Two => pack_bits::<2>(values, bytes),
            BitWidth::Three => pack_bits::<3>(values, bytes),
            BitWidth::Four => pack_bits::<4>(values, bytes),
            BitWidth::Six => pack_bits::<6>(values, bytes),
            BitWidth::Eight => bytes.copy_from_slice(values),
        });
        Ok(Packed { bytes, bits, len: values.len() })
    }

    /// Takes bytes that are packed already.
    ///
    /// # Errors
    /// [`Error::Argument`] if the number of bytes is not that of `len` numbers, or bits after the
    /// last number are set.
    pub fn from_bytes(bytes: Vec<u8>, bits: BitWidth, len: usize) -> Result<Self> {
        Self::checked(bytes, bits, len).map_err(Error::Argument)
    }

    pub(super) fn checked(bytes: Vec<u8>, bits: BitWidth, len: usize) -> Result<Self, String> {
        let expected = byte_count(len, bits)?;
        if bytes.len() != expected {
            return Err(format!("has {} bytes; {len} numbers of {bits} bits have {expected}", bytes.len()));
        }
        // No overflow: the bytes are there.
        let used = (len as u64 * u64::from(bits.bits())) % 8;
        if used != 0 && bytes.last().is_some_and(|last| last >> used != 0) {
            return Err("has bits set after its last number".into());
        }
        Ok(Packed { bytes, bits, len })
    }

    /// Number `i`, which must be below [`len`](Self::len).
    #[must_use]
    pub fn get(&self, i: usize) -> u8 {
        let bit = i * usize::from(self.bits.bits());
        // The last number may end with its byte.
        let next = self.bytes.get(bit / 8 + 1).copied().unwrap_or(0);
        let window = u16::from(self.bytes[bit / 8]) | u16::from(next) << 8;
        (window >> (bit % 8)) as u8 & self.bits.max_index()
    }

    /// Eight numbers from number `i` on, the first in the lowest bits; zeros after the last.
    pub(super) fn eight(&self, i: usize) -> u64 {
        let bit = i * usize::from(self.bits.bits());
        let bytes = &self.bytes[(bit / 8).min(self.bytes.len())..];
        let word = match bytes.first_chunk::<8>() {
            Some(word) => u64::from_le_bytes(*word),
            None => bytes.iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte)),
        };
        // Numbers of 8 bits begin with a byte; others leave the 7 bits that this may take.
        word >> (bit % 8)
    }

    /// All numbers.
    #[must_use]
    pub fn unpack(&self) -> Vec<u8> {
        (0..self.len).map(|i| self.get(i)).collect()
    }

    /// The packed bytes: ceil(len * bits / 8).
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The width of a number.
    #[must_use]
    pub fn bits(&self) -> BitWidth {
        self.bits
    }

    /// How many numbers.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

/// Packs numbers of `BITS` bits, which are known to have no more.
fn pack_bits<const BITS: usize>(values: &[u8], bytes: &mut [u8]) {
    let word = |values: &[u8]| values.iter().rev().fold(0_u64, |word, value| word << BITS | u64::from(*value));
    let (eights, rest) = values.as_chunks::<8>();
    let (whole, last) = bytes.split_at_mut(BITS * eights.len());
    for (to, eight) in whole.as_chunks_mut::<BITS>().0.iter_mut().zip(eights) {
        to.copy_from_slice(&word(eight).to_le_bytes()[..BITS]);
    }
    last.copy_from_slice(&word(rest).to_le_bytes()[..last.len()]);
}

/// Numbers that a thread packs at once; a multiple of 8.
const PIECE: usize = 1 << 16;

/// The bytes that `len` numbers take.
pub(super) fn byte_count(len: usize, bits: BitWidth) -> Result<usize, String> {
    let bits = len.checked_mul(usize::from(bits.bits())).ok_or_else(|| format!("{len} numbers are too many"))?;
    Ok(bits.div_ceil(8))
}

/// Which elements, or vectors of elements, of a weight are kept: one bit each in row-major order,
/// 1 = kept, packed as [`Packed`] of one bit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mask(Packed);

impl Mask {
    /// Packs `keep`.
    #[must_use]
    pub fn from_bools(keep: &[bool]) -> Self {
        let bit = |(at, kept): (usize, &bool)| u8::from(*kept) << at;
        let mut bytes = vec![0; keep.len().div_ceil(8)];
        bytes.par_chunks_mut(PIECE / 8).zip(keep.par_chunks(PIECE)).for_each(|(bytes, keep)| {
            let (eights, rest) = keep.as_chunks::<8>();
            for (byte, eight) in bytes.iter_mut().zip(eights) {
                // The product moves the lowest bit of byte i to bit 56 + i.
                *byte = (u64::from_le_bytes(eight.map(u8::from)).wrapping_mul(0x0102_0408_1020_4080) >> 56) as u8;
            }
            if let (false, Some(last)) = (rest.is_empty(), bytes.last_mut()) {
                *last = rest.iter().enumerate().map(bit).sum();
            }
        });
        Mask(Packed { bytes, bits: BitWidth::One, len: keep.len() })
    }

    /// Takes a mask of `len` elements that is packed already.
    ///
    /// # Errors
    /// [`Error::Argument`] if the number of bytes is not ceil(len / 8), or bits after the last
    /// element are set.
    pub fn from_bytes(bytes: Vec<u8>, len: usize) -> Result<Self> {
        Ok(Mask(Packed::from_bytes(bytes, BitWidth::One, len)?))
    }

    pub(super) fn checked(bytes: Vec<u8>, len: usize) -> Result<Self, String> {
        Ok(Mask(Packed::checked(bytes, BitWidth::One, len)?))
    }

    /// One bool an element.
    #[must_use]
    pub fn to_bools(&self) -> Vec<bool> {
        (0..self.len()).map(|i| self.get(i)).collect()
    }

    /// Whether element `i` is kept, which must be below [`len`](Self::len).
    #[must_use]
    pub fn get(&self, i: usize) -> bool {
        self.0.bytes[i / 8] >> (i % 8) & 1 == 1
    }

    /// How many elements are kept.
    #[must_use]
    pub fn kept(&self) -> usize {
        count_ones(&self.0.bytes)
    }

    /// How many of a range of elements are kept, which must end by [`len`](Self::len).
    pub(super) fn kept_in(&self, range: Range<usize>) -> usize {
        let bytes = self.bytes();
        // The kept elements among those of a byte that lie before an element.
        let before = |at: usize| match at % 8 {
            0 => 0,
            bits => (bytes[at / 8] << (8 - bits)).count_ones() as usize,
        };
        count_ones(&bytes[range.start / 8..range.end / 8]) + before(range.end) - before(range.start)
    }

    /// The packed bytes: ceil(len / 8).
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        self.0.bytes()
    }

    /// The number of elements, kept and pruned.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// The set bits of `bytes`.
pub(super) fn count_ones(bytes: &[u8]) -> usize {
    let (words, rest) = bytes.as_chunks::<8>();
    let words: usize = words.iter().map(|word| u64::from_le_bytes(*word).count_ones() as usize).sum();
    words + rest.iter().map(|byte| byte.count_ones() as usize).sum::<usize>()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The stream's definition, a bit at a time.
    fn pack_by_bits(values: &[u8], bits: BitWidth) -> Vec<u8> {
        let width = usize::from(bits.bits());
        let mut bytes = vec![0; (values.len() * width).div_ceil(8)];
        for k in 0..values.len() * width {
            bytes[k / 8] |= (values[k / width] >> (k % width) & 1) << (k % 8);
        }
        bytes
    }

    proptest! {
        #[test]
        fn packing_follows_the_definition_and_comes_back(bits in prop::sample::select(&BitWidth::ALL[..]), values in prop::collection::vec(any::<u8>(), 0..70)) {
            let values: Vec<u8> = values.iter().map(|value| value & bits.max_index()).collect();
            let packed = Packed::pack(&values, bits).unwrap();
            prop_assert_eq!(packed.bytes(), pack_by_bits(&values, bits));
            prop_assert_eq!(packed.unpack(), values.clone());
            for first in 0..values.len() {
                let eight = packed.eight(first);
                let value = |i: usize| (eight >> (i * usize::from(bits.bits()))) as u8 & bits.max_index();
                let here = values[first..].iter().take(8);
                prop_assert!(here.enumerate().all(|(i, expected)| value(i) == *expected));
            }
            prop_assert_eq!((packed.len(), packed.is_empty(), packed.bits()), (values.len(), values.is_empty(), bits));
            let again = Packed::from_bytes(packed.bytes().to_vec(), bits, values.len()).unwrap();
            prop_assert_eq!(again, packed);
        }

        #[test]
        fn masks_come_back(keep in prop::collection::vec(any::<bool>(), 0..300)) {
            let mask = Mask::from_bools(&keep);
            prop_assert_eq!(mask.to_bools(), keep.clone());
            prop_assert_eq!(mask.kept(), keep.iter().filter(|kept| **kept).count());
            for first in 0..=keep.len().min(20) {
                let kept = keep[first..].iter().filter(|kept| **kept).count();
                prop_assert_eq!(mask.kept_in(first..keep.len()), kept);
                prop_assert_eq!(mask.kept_in(0..first), mask.kept() - kept);
            }
            prop_assert_eq!(mask.bytes(), pack_by_bits(&keep.iter().map(|kept| u8::from(*kept)).collect::<Vec<_>>(), BitWidth::One));
            prop_assert_eq!(Mask::from_bytes(mask.bytes().to_vec(), keep.len()).unwrap(), mask);
        }

        #[test]
        fn wrong_sizes_and_stray_bits_are_refused(bits in prop::sample::select(&BitWidth::ALL[..]), len in 0usize..40, bit in 0u8..8) {
            let count = byte_count(len, bits).unwrap();
            prop_assert!(Packed::from_bytes(vec![0; count + 1], bits, len).is_err());
            prop_assert!(count == 0 || Packed::from_bytes(vec![0; count - 1], bits, len).is_err());
            let used = (len * usize::from(bits.bits())) % 8;
            if count > 0 {
                let mut bytes = vec![0; count];
                bytes[count - 1] = 1 << bit;
                prop_assert_eq!(Packed::from_bytes(bytes, bits, len).is_ok(), used == 0 || usize::from(bit) < used);
            }
        }
    }

    #[test]
    fn what_cannot_be_packed_is_refused() {
        for bits in [0, 5, 7, 9, 255] {
            assert!(BitWidth::try_from(bits).is_err(), "{bits}");
        }
        assert!(Packed::pack(&[8], BitWidth::Three).is_err());
        assert!(Packed::from_bytes(vec![], BitWidth::Eight, usize::MAX).is_err());
        assert!(Mask::from_bytes(vec![0], usize::MAX).is_err());
        assert!(Packed::from_bytes(vec![], BitWidth::Six, usize::MAX).is_err());
    }

    /// More than a piece, which a thread packs at once.
    #[test]
    fn pieces_are_packed_to_what_the_whole_is() {
        let values: Vec<u8> = (0..2 * PIECE + 13).map(|i| (i * 7 + i / 300) as u8).collect();
        for bits in BitWidth::ALL {
            let values: Vec<u8> = values.iter().map(|value| value & bits.max_index()).collect();
            assert!(Packed::pack(&values, bits).unwrap().bytes() == pack_by_bits(&values, bits), "{bits} bits");
        }
        let keep: Vec<bool> = values.iter().map(|value| value % 3 > 0).collect();
        let bits: Vec<u8> = keep.iter().map(|kept| u8::from(*kept)).collect();
        assert!(Mask::from_bools(&keep).bytes() == pack_by_bits(&bits, BitWidth::One), "a mask");
    }

    /// As in coremltools' files: mask bits 0111 0001, 0000 1100 are 8e 30; indices 3, 0, 1, 3, 0,
    /// 1, 3, 1 of two bits are d3 74.
    #[test]
    fn bytes_of_a_core_ml_file() {
        let keep: Vec<bool> = "0111000100001100".chars().map(|bit| bit == '1').collect();
        assert_eq!(Mask::from_bools(&keep).bytes(), [0x8e, 0x30]);
        assert_eq!(Packed::pack(&[3, 0, 1, 3, 0, 1, 3, 1], BitWidth::Two).unwrap().bytes(), [0xd3, 0x74]);
    }
}
