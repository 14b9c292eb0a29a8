//! fp16 values as the little-endian bytes of a file, and back.

use half::f16;
use sha2::{Digest, Sha256};
use squeeze_base::digest;

/// Gives the bytes of `values` piece by piece, so that no second copy of a large weight is made.
fn for_each_block(values: &[f16], mut take: impl FnMut(&[u8])) {
    const VALUES: usize = 1 << 14;
    let mut buffer = vec![0; 2 * VALUES];
    for block in values.chunks(VALUES) {
        let bytes = &mut buffer[..2 * block.len()];
        bytes.as_chunks_mut::<2>().0.iter_mut().zip(block).for_each(|(to, value)| *to = value.to_le_bytes());
        take(bytes);
    }
}

/// SHA-256 of the bytes of `values`, in hex.
pub(super) fn sha256(values: &[f16]) -> String {
    let mut hash = Sha256::new();
    for_each_block(values, |bytes| hash.update(bytes));
    digest::hex(hash)
}

/// The bytes of `values`.
pub(super) fn to_bytes(values: &[f16]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

/// The values of `bytes`, of which there is an even number.
pub(super) fn from_bytes(bytes: &[u8]) -> Vec<f16> {
    let (pairs, rest) = bytes.as_chunks::<2>();
    debug_assert!(rest.is_empty(), "the header was checked: an fp16 tensor has two bytes for each element");
    pairs.iter().map(|pair| f16::from_le_bytes(*pair)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hash_is_that_of_the_bytes() {
        // More than a block, and not a whole number of blocks.
        let values: Vec<f16> = (0..40_001).map(|i| f16::from_bits(i as u16)).collect();
        assert_eq!(sha256(&values), digest::of_bytes(&to_bytes(&values)));
        assert_eq!(from_bytes(&to_bytes(&values)).len(), values.len());
    }
}
