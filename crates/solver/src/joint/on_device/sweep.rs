//! Rounds weights to their palettes column by column, with error feedback to the later columns.

use squeeze_base::error::Result;
use squeeze_numerics::product::add_product;
use tch::Tensor;

use super::super::super::factor::inverse;
use super::super::super::matrix::{copy, panels};
use super::super::sweep::BLOCK;
use super::blocks::{Blocks, Columns};
use super::problem::Problem;

/// The sweep of the [solver for CPUs](super::super::sweep::sweep) over all rows of `weight` [o, d];
/// sets `indices` [o, d], u8.
pub(super) fn sweep(problem: &Problem<'_>, weight: &Tensor, blocks: &Blocks, indices: &Tensor) -> Result<()> {
    let _span = tracing::debug_span!("sweep").entered();
    let triangle = &problem.factors.factors[0].triangle;
    let d = problem.size()?.1;
    // D R of the columns already processed, for D their change.
    let left = weight.f_zeros_like()?;
    for columns in panels(d, BLOCK) {
        let width = columns.end - columns.start;
        let of_block = |tensor: &Tensor| tensor.f_narrow(1, columns.start, width);
        let r = triangle.tail_of(columns.clone())?;
        let upper = inverse(&r.f_narrow(1, 0, width)?)?;
        let before = of_block(weight)?;
        let mut values = copy(&before.f_contiguous()?)?;
        add_product(&values, &of_block(&left)?, &upper)?;
        let keep = problem.keep.as_ref().map(of_block).transpose()?;
        blocks.sweep(&mut values, &Columns { square: &upper, keep: keep.as_ref(), indices: &of_block(indices)? })?;
        if columns.end < d {
            let after = r.f_narrow(1, width, d - columns.end)?;
            add_product(&left.f_narrow(1, columns.end, d - columns.end)?, &before.f_sub(&values)?, &after)?;
        }
    }
    Ok(())
}
