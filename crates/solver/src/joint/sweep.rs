//! Rounds weights to their palettes column by column, with error feedback to the later columns.

use rayon::prelude::*;
use squeeze_base::error::Result;
use squeeze_numerics::product::add_product;
use tch::Tensor;

use super::super::factor::inverse;
use super::super::matrix::{block, copy, panels, to_vec};
use super::problem::Problem;
use super::sorted_codebook::{Palette, SortedCodebook};

/// The number of columns after which the rest of the row is updated.
pub(super) const BLOCK: i64 = 128;

/// Gives each kept weight a palette entry by the update of SparseGPT (Frantar and Alistarh 2023;
/// GPTQ, arXiv:2210.17323): q is the entry nearest to w, or 0 where pruned, and e = (w - q) / U_jj
/// is fed back to the columns after it, w -= e U_j. The update uses the
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
            for (row, entries) in entries.chunks(width as usize).enumerate() {
                let start = (rows.start + row) * data.columns + columns.start as usize;
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
    let mut entries = vec![0; values.len()];
    values.par_chunks_mut(width).zip(entries.par_chunks_mut(width)).enumerate().for_each(|(at, (values, entries))| {
        let start = (row + at) * data.columns + column;
        sweep_row(values, entries, upper, sorted.of_row(row + at), |j| data.kept(start + j));
    });
    entries
}

/// Sweeps over one row of a block, with U [b, b]: `values` become the rounded weights, and
/// `entries` their indices.
pub(super) fn sweep_row(
    values: &mut [f32],
    entries: &mut [u8],
    upper: &[f32],
    palette: Palette<'_>,
    kept: impl Fn(usize) -> bool,
) {
    let width = values.len();
    for j in 0..width {
        let (done, rest) = values.split_at_mut(j + 1);
        let target = if kept(j) {
            entries[j] = palette.nearest(done[j]);
            palette.values[usize::from(entries[j])]
        } else {
            0.0
        };
        let error = (done[j] - target) / upper[j * width + j];
        done[j] = target;
        rest.iter_mut().zip(&upper[j * width + j + 1..]).for_each(|(value, upper)| *value -= error * upper);
    }
}
