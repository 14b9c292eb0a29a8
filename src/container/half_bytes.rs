//! fp16 values as the little-endian bytes of a file, and back.

use half::f16;

/// Gives the bytes of `values` piece by piece, so that no second copy of a large weight is made.
pub(super) fn for_each_block(values: &[f16], mut take: impl FnMut(&[u8])) {
    const VALUES: usize = 1 << 14;
    let mut buffer = Vec::with_capacity(2 * VALUES);
    for block in values.chunks(VALUES) {
        buffer.clear();
        buffer.extend(block.iter().flat_map(|value| value.to_le_bytes()));
        take(&buffer);
    }
}

/// The bytes of `values`.
pub(super) fn to_bytes(values: &[f16]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

/// The values of `bytes`; an odd last byte is left out, callers have checked the length.
pub(super) fn from_bytes(bytes: &[u8]) -> Vec<f16> {
    bytes.as_chunks::<2>().0.iter().map(|pair| f16::from_le_bytes(*pair)).collect()
}
