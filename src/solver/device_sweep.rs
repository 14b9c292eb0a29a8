//! SparseGPT's sweep by tensor operations, for weights on a GPU: nothing of it comes to the host.

use tch::{Kind, Tensor};

use super::matrix::block;
use crate::error::Result;

/// Marks the `count` smallest of w^2 / U_jj^2 in a block of columns, weights [o, b], with all that tie with the last of them: coremltools'
/// rule (`SparseGPT._compress_impl`). A bool tensor [o, b].
pub(super) fn smallest(weight: &Tensor, upper: &Tensor, count: usize) -> Result<Tensor> {
    if count == 0 {
        return Ok(weight.f_zeros_like()?.f_to_kind(Kind::Bool)?);
    }
    let scores = weight.f_div(&upper.f_diagonal(0, 0, 1)?)?.f_square()?;
    let (threshold, _) = scores.f_flatten(0, -1)?.f_kthvalue(count as i64, 0, false)?;
    Ok(scores.f_le_tensor(&threshold)?)
}

/// As [`sweep`](super::sweep::sweep), on `weight` [o, b] and its mask `pruned` in place, with U [b, b] of these columns. Gives what the
/// pruning leaves to later columns, [o, b].
///
/// Two operations a column go to the device, and none waits for another's result on the host.
pub(super) fn sweep(weight: &Tensor, upper: &Tensor, pruned: &Tensor, ratio: Option<(usize, usize)>) -> Result<Tensor> {
    let (rows, columns) = weight.size2()?;
    let diagonal = upper.f_diagonal(0, 0, 1)?;
    let factors = diagonal.f_reciprocal()?.f_neg()?;
    let error = weight.f_zeros_like()?;
    // What each element is multiplied with to make its error: -1 / U_jj where it is pruned, else zero.
    let mut passed = pruned.f_to_kind(Kind::Float)?.f_mul(&factors)?;
    for column in 0..columns {
        if let Some((n, m)) = ratio.map(|(n, m)| (n as i64, m as i64))
            && column % m == 0
            && column + m <= columns
        {
            let group = column..column + m;
            let scores = block(weight, 0..rows, group.clone())?.f_div(&diagonal.f_narrow(0, column, m)?)?.f_square()?;
            let (_, chosen) = scores.f_topk(n, 1, false, false)?;
            let mut marks = block(pruned, 0..rows, group.clone())?;
            let _ = marks.f_zero_()?.f_scatter_value_(1, &chosen, 1)?;
            block(&passed, 0..rows, group)?.f_copy_(&marks.f_to_kind(Kind::Float)?.f_mul(&factors.f_narrow(0, column, m)?)?)?;
        }
        let one = column..column + 1;
        let mut own = block(&error, 0..rows, one.clone())?;
        own.f_copy_(&block(weight, 0..rows, one.clone())?.f_mul(&block(&passed, 0..rows, one.clone())?)?)?;
        if column + 1 < columns {
            let after = column + 1..columns;
            let _ = block(weight, 0..rows, after.clone())?.f_addmm_(&own, &block(upper, one, after)?)?;
        }
    }
    passed = weight.f_masked_fill(pruned, 0.0)?;
    weight.shallow_clone().f_copy_(&passed)?;
    Ok(error)
}
