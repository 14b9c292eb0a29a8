//! Coordinate descent over the indices, weight by weight.

use squeeze_base::error::Result;
use tch::{Kind, Tensor};

use super::super::polish::{BLOCK, gradient};
use super::blocks::{Blocks, Columns};
use super::problem::Problem;

/// The polish of the [solver for CPUs](super::super::polish::polish), for all rows of the indices
/// [o, d], u8. Returns the number of weights that changed.
pub(super) fn polish(problem: &Problem<'_>, blocks: &Blocks, indices: &Tensor) -> Result<u64> {
    let _span = tracing::debug_span!("polish").entered();
    let h = &problem.part.h;
    let change = blocks.decode(indices, problem.keep.as_ref())?.f_sub_(&problem.original)?;
    let changed = Tensor::f_zeros([problem.size()?.0], (Kind::Int, change.device()))?;
    for panel in 0..h.count() {
        let mut start = h.rows(panel).start;
        while start < h.rows(panel).end {
            let end = h.rows(panel).end.min(start + BLOCK);
            let of_block = |tensor: &Tensor| tensor.f_narrow(1, start, end - start);
            let (gradient, corner) = gradient(h, &change, panel, start, end)?;
            let keep = problem.keep.as_ref().map(of_block).transpose()?;
            let columns = Columns { square: &corner, keep: keep.as_ref(), indices: &of_block(indices)? };
            blocks.polish(&gradient, &columns, &of_block(&change)?, &changed)?;
            start = end;
        }
    }
    Ok(changed.f_sum(Kind::Int64)?.f_int64_value(&[])?.unsigned_abs())
}
