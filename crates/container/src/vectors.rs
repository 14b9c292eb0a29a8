//! Decodes weights with vector palettes.

use half::f16;
use rayon::prelude::*;
use squeeze_codebook::Codebook;

use super::look_up::{look_up, look_up_kept};
use super::packed::{Mask, Packed};

/// Writes the weight of vector palettes along axis 0 to `dense`, [o, …] row-major, which is zero
/// before. The sizes have been checked.
///
/// `indices` and `mask` have rows of vectors; each becomes `vector_length` neighbouring rows of
/// `dense`. A table for each of these rows has one value of every entry, so that the loops are
/// those of scalar palettes.
pub(super) fn decode(codebook: &Codebook, indices: &Packed, mask: Option<&Mask>, dense: &mut [f16]) {
    let Codebook { group_size, vector_length, .. } = *codebook;
    let outputs = codebook.groups() * group_size;
    let columns = dense.len() / outputs;
    let firsts = first_indices(outputs / vector_length, columns, mask);
    dense.par_chunks_mut(vector_length * columns).zip(firsts).enumerate().for_each(|(vector, (rows, first))| {
        let palette = codebook.palette(vector * vector_length / group_size);
        for (member, row) in rows.chunks_mut(columns).enumerate() {
            // With room for any index of 8 bits, so that none is checked.
            let mut table = [f16::ZERO; 256];
            let entries = palette.iter().skip(member).step_by(vector_length);
            table.iter_mut().zip(entries).for_each(|(to, value)| *to = *value);
            match mask {
                None => look_up(&table, indices, row, first),
                Some(mask) => look_up_kept(&table, indices, mask, vector * columns, row, first),
            };
        }
    });
}

/// The number of the first index of each of `rows` rows of vectors.
fn first_indices(rows: usize, columns: usize, mask: Option<&Mask>) -> Vec<usize> {
    let Some(mask) = mask else { return (0..rows).map(|row| row * columns).collect() };
    let counts: Vec<usize> = (0..rows).into_par_iter().map(|row| mask.kept_in(row * columns..(row + 1) * columns)).collect();
    let firsts = counts.into_iter().scan(0, |before, count| {
        let first = *before;
        *before += count;
        Some(first)
    });
    firsts.collect()
}
