//! Rounds weights to their palettes column by column, with error feedback to the later columns.

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;
use squeeze_base::error::Result;
use squeeze_numerics::product::add_product;
use tch::Tensor;

use super::super::factor::inverse;
use super::super::matrix::{block, copy, panels, to_vec};
use super::problem::Problem;
use super::sorted_codebook::{Entries, Palette, SortedCodebook};
use crate::palette::VectorTable;

/// The number of columns after which the rest of the row is updated.
pub(super) const BLOCK: i64 = 128;

/// Gives each kept weight a palette entry by the update of SparseGPT (Frantar and Alistarh 2023;
/// GPTQ, arXiv:2210.17323): q is the entry nearest to w, or 0 where pruned, and e = (w - q) / U_jj
/// is fed back to the columns after it, w -= e U_j. All rows have the same U, so that a vector of
/// rows gets the entry that is nearest by Euclidean distance. The update uses the
/// [`Factor`](super::super::Factor) R, as [`prune`](super::super::prune) does.
///
/// `weight` are the weights that are rounded. They should be the least-squares weights on their
/// mask, because the objective is then, up to a constant, the squared distance from them under H.
pub(super) fn sweep(problem: &Problem<'_>, weight: &[f32], sorted: &mut SortedCodebook) -> Result<()> {
    let data = &problem.data;
    let d = data.columns as i64;
    for (part, rows) in problem.chunks() {
        let triangle = &problem.factors.factors[part].triangle;
        let count = rows.len() as i64;
        let start = Tensor::f_from_slice(&weight[data.span(&rows)])?.f_reshape([count, d])?.f_to_device(triangle.device())?;
        // D R of the columns already processed, for D their change.
        let left = start.f_zeros_like()?;
        for columns in panels(d, BLOCK) {
            let r = triangle.tail_of(columns.clone())?;
            let width = columns.end - columns.start;
            let upper = inverse(&r.f_narrow(1, 0, width)?)?;
            let before = block(&start, 0..count, columns.clone())?;
            let now = copy(&before)?;
            add_product(&now, &block(&left, 0..count, columns.clone())?, &upper)?;
            let mut values = to_vec(&now)?;
            let entries = sweep_block(problem, sorted, &mut values, &to_vec(&upper)?, rows.start, columns.start as usize);
            let first = rows.start / sorted.vector_length;
            for (vector, entries) in entries.chunks(width as usize).enumerate() {
                let start = (first + vector) * data.columns + columns.start as usize;
                sorted.indices[start..start + entries.len()].copy_from_slice(entries);
            }
            if columns.end < d {
                let stored = Tensor::f_from_slice(&values)?.f_reshape([count, width])?.f_to_device(triangle.device())?;
                let after = r.f_narrow(1, width, d - columns.end)?;
                add_product(&block(&left, 0..count, columns.end..d)?, &before.f_sub(&stored)?, &after)?;
            }
        }
    }
    Ok(())
}

/// Sweeps over a block [rows, b] whose first element is at `row` and `column`, and replaces
/// `values` by the rounded weights. Returns the indices.
fn sweep_block(
    problem: &Problem<'_>,
    sorted: &SortedCodebook,
    values: &mut [f32],
    upper: &[f32],
    row: usize,
    column: usize,
) -> Vec<u8> {
    let data = &problem.data;
    let width = upper.len().isqrt();
    let length = sorted.vector_length;
    let mut entries = vec![0; values.len() / length];
    let vectors = values.par_chunks_mut(width * length).zip(entries.par_chunks_mut(width));
    vectors.enumerate().for_each(|(vector, (values, entries))| {
        let row = row + vector * length;
        let start = row * data.columns + column;
        sweep_rows(values, entries, upper, sorted.of_row(row), |j| data.kept(start + j));
    });
    entries
}

/// Sweeps over the V rows [V, b] of a block that share indices, with U [b, b]: `values` become the
/// rounded weights, and `entries` `[b]` their indices.
pub(super) fn sweep_rows(
    values: &mut [f32],
    entries: &mut [u8],
    upper: &[f32],
    palette: Palette<'_>,
    kept: impl Fn(usize) -> bool,
) {
    match palette {
        Palette::Scalars(palette) => sweep_vectors(values, entries, upper, &palette, kept),
        Palette::Pairs(palette) => Arch::new().dispatch(Vectors { values, entries, upper, palette, kept }),
        Palette::Fours(palette) => Arch::new().dispatch(Vectors { values, entries, upper, palette, kept }),
    }
}

/// [`sweep_vectors`] in SIMD, for palettes whose search takes longer than the rest.
struct Vectors<'a, const V: usize, F> {
    values: &'a mut [f32],
    entries: &'a mut [u8],
    upper: &'a [f32],
    palette: &'a VectorTable<V>,
    kept: F,
}

impl<const V: usize, F: Fn(usize) -> bool> WithSimd for Vectors<'_, V, F> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        sweep_vectors(self.values, self.entries, self.upper, self.palette, self.kept);
    }
}

#[inline(always)]
fn sweep_vectors<const V: usize>(
    values: &mut [f32],
    entries: &mut [u8],
    upper: &[f32],
    palette: &impl Entries<V>,
    kept: impl Fn(usize) -> bool,
) {
    let width = entries.len();
    for j in 0..width {
        let now: [f32; V] = std::array::from_fn(|member| values[member * width + j]);
        let mut target = [0.0; V];
        if kept(j) {
            entries[j] = palette.nearest(now);
            target = palette.entry(entries[j]);
        }
        let after = &upper[j * width + j + 1..(j + 1) * width];
        for member in 0..V {
            let error = (now[member] - target[member]) / upper[j * width + j];
            let (done, rest) = values[member * width..(member + 1) * width].split_at_mut(j + 1);
            done[j] = target[member];
            // A loop, because closures are not compiled for the SIMD instructions of `dispatch`.
            for (value, upper) in rest.iter_mut().zip(after) {
                *value -= error * upper;
            }
        }
    }
}
