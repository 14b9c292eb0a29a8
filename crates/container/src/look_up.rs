//! The inner loops of decoding: palette entries for packed indices.

use half::f16;
use squeeze_codebook::BitWidth;

use super::packed::{Mask, Packed};

/// Writes the entries for the indices from number `value` on to `elements`; returns the number of
/// the next index.
pub(super) fn look_up(table: &[f16; 256], indices: &Packed, elements: &mut [f16], value: usize) -> usize {
    match indices.bits() {
        BitWidth::One => look_up_bits::<1>(table, indices, elements, value),
        BitWidth::Two => look_up_bits::<2>(table, indices, elements, value),
        BitWidth::Three => look_up_bits::<3>(table, indices, elements, value),
        BitWidth::Four => look_up_bits::<4>(table, indices, elements, value),
        BitWidth::Six => look_up_bits::<6>(table, indices, elements, value),
        BitWidth::Eight => look_up_bits::<8>(table, indices, elements, value),
    }
    value + elements.len()
}

/// [`look_up`] for a number of bits that is known when this is compiled, which is several times as
/// fast.
fn look_up_bits<const BITS: usize>(table: &[f16; 256], indices: &Packed, elements: &mut [f16], value: usize) {
    let entry = |word: u64, i: usize| table[(word >> (i * BITS)) as usize & ((1 << BITS) - 1)];
    let (eights, rest) = elements.as_chunks_mut::<8>();
    let after = value + 8 * eights.len();
    for (place, eight) in eights.iter_mut().enumerate() {
        let word = indices.eight(value + 8 * place);
        for (i, element) in eight.iter_mut().enumerate() {
            *element = entry(word, i);
        }
    }
    if !rest.is_empty() {
        let word = indices.eight(after);
        rest.iter_mut().enumerate().for_each(|(i, element)| *element = entry(word, i));
    }
}

/// As [`look_up`], for the kept elements among those from element `at` on; the others are zero.
pub(super) fn look_up_kept(
    table: &[f16; 256],
    indices: &Packed,
    mask: &Mask,
    at: usize,
    elements: &mut [f16],
    mut value: usize,
) -> usize {
    let (width, most) = (indices.bits().bits(), indices.bits().max_index());
    // Up to a whole byte of the mask, and then byte by byte.
    let head = (at.next_multiple_of(8) - at).min(elements.len());
    let (first, rest) = elements.split_at_mut(head);
    let mut piece = |at: usize, elements: &mut [f16]| {
        let Some(byte) = mask.bytes().get(at / 8) else { return };
        let mut kept = byte >> (at % 8);
        let mut word = indices.eight(value);
        // Masks are so irregular that there is no branch on their bits.
        for element in elements {
            let is_kept = kept & 1;
            *element = f16::from_bits(table[usize::from(word as u8 & most)].to_bits() * u16::from(is_kept));
            word >>= is_kept * width;
            value += usize::from(is_kept);
            kept >>= 1;
        }
    };
    piece(at, first);
    let (eights, last) = rest.as_chunks_mut::<8>();
    let after = at + head + 8 * eights.len();
    for (place, eight) in eights.iter_mut().enumerate() {
        piece(at + head + 8 * place, eight);
    }
    piece(after, last);
    value
}
