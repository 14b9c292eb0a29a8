//! SparseGPT's sweep by tensor operations, for weights on a GPU: without transfers to the host, for
//! a batch of layers of one shape.

use squeeze_base::error::Result;
use tch::{Kind, Tensor};

use super::kernels::Kernels;

/// Marks the `count` smallest of w^2 / U_jj^2 of each layer in a block of columns, weights [l, o,
/// b], and all elements equal to the last of them: coremltools' rule (`SparseGPT._compress_impl`).
/// Of rows that are pruned together, `count` vectors by the sums of their scores. A bool tensor [l,
/// o, b].
pub(super) fn smallest(weight: &Tensor, upper: &Tensor, count: usize, rows_together: usize) -> Result<Tensor> {
    if count == 0 {
        return Ok(weight.f_zeros_like()?.f_to_kind(Kind::Bool)?);
    }
    let scores = of_vectors(weight.f_div(&diagonal(upper)?)?.f_square()?, rows_together)?;
    // A GPU sorts many numbers sooner than libtorch selects one of them.
    let (sorted, _) = scores.f_flatten(1, -1)?.f_sort(1, false)?;
    let threshold = sorted.f_narrow(1, count as i64 - 1, 1)?;
    of_rows(scores.f_le_tensor(&threshold.f_unsqueeze(2)?)?, rows_together)
}

/// The sums over vectors of rows: [l, o, b] to [l, o / V, b].
fn of_vectors(scores: Tensor, rows_together: usize) -> Result<Tensor> {
    if rows_together == 1 {
        return Ok(scores);
    }
    let (layers, rows, columns) = scores.size3()?;
    let together = rows_together as i64;
    let vectors = scores.f_reshape([layers, rows / together, together, columns])?;
    Ok(vectors.f_sum_dim_intlist([2_i64].as_slice(), false, Kind::Float)?)
}

/// The marks of vectors of rows for each row: [l, o / V, b] to [l, o, b].
fn of_rows(marks: Tensor, rows_together: usize) -> Result<Tensor> {
    if rows_together == 1 { Ok(marks) } else { Ok(marks.f_repeat_interleave_self_int(rows_together as i64, 1, None)?) }
}

/// The diagonals of U [l, b, b]: [l, 1, b].
fn diagonal(upper: &Tensor) -> Result<Tensor> {
    Ok(upper.f_diagonal(0, 1, 2)?.f_unsqueeze(1)?)
}

/// As [`sweep`](super::sweep::sweep), on `weight` [l, o, b] and its mask `pruned` in place, with U
/// [l, b, b] of these columns. Returns each element's error, [l, o, b], zero where it was kept.
///
/// It launches two operations per column on the device, and never waits for a result on the host.
pub(super) fn sweep(
    weight: &Tensor,
    upper: &Tensor,
    pruned: &Tensor,
    ratio: Option<(usize, usize)>,
    rows_together: usize,
) -> Result<Tensor> {
    let columns = weight.size3()?.2;
    let diagonal = diagonal(upper)?;
    let factors = diagonal.f_reciprocal()?.f_neg()?;
    let errors = weight.f_zeros_like()?;
    // The factor from an element to its error: -1 / U_jj where it is pruned, else zero.
    let passed = pruned.f_to_kind(Kind::Float)?.f_mul(&factors)?;
    for column in 0..columns {
        if let Some((n, m)) = ratio.map(|(n, m)| (n as i64, m as i64))
            && column % m == 0
            && column + m <= columns
        {
            let group = |tensor: &Tensor| tensor.f_narrow(2, column, m);
            let scores = of_vectors(group(weight)?.f_div(&group(&diagonal)?)?.f_square()?, rows_together)?;
            let (_, chosen) = scores.f_topk(n, 2, false, false)?;
            let chosen = of_rows(chosen, rows_together)?;
            let marks = group(pruned)?.f_zero_()?.f_scatter_value_(2, &chosen, 1)?;
            group(&passed)?.f_copy_(&marks.f_to_kind(Kind::Float)?.f_mul(&group(&factors)?)?)?;
        }
        let one = |tensor: &Tensor| tensor.f_narrow(2, column, 1);
        let error = one(weight)?.f_mul_out(&one(&errors)?, &one(&passed)?)?;
        let rest = columns - column - 1;
        if rest > 0 {
            let row = upper.f_narrow(1, column, 1)?.f_narrow(2, column + 1, rest)?;
            let _ = weight.f_narrow(2, column + 1, rest)?.f_addcmul_(&error, &row)?;
        }
    }
    let _ = weight.shallow_clone().f_masked_fill_(pruned, 0.0)?;
    Ok(errors)
}

/// [`sweep`] by a kernel, which takes blocks of at most
/// [`MOST_COLUMNS`](super::kernels::MOST_COLUMNS). Returns the sum of the squared errors of each
/// layer, `[l]` in fp64.
pub(super) fn sweep_by_kernel(
    kernels: &Kernels,
    weight: &Tensor,
    upper: &Tensor,
    pruned: &Tensor,
    ratio: Option<(usize, usize)>,
) -> Result<Tensor> {
    let (layers, rows, _) = weight.size3()?;
    let keep = pruned.f_logical_not()?;
    let squares = Tensor::f_zeros([layers, rows], (Kind::Double, weight.device()))?;
    let upper = upper.f_contiguous()?;
    for layer in 0..layers {
        let of_layer = |tensor: &Tensor| tensor.f_get(layer);
        let (keep, squares) = (of_layer(&keep)?, of_layer(&squares)?);
        kernels.sweep(&of_layer(weight)?, &of_layer(&upper)?, Some(&keep), None, Some(&squares), ratio)?;
    }
    if ratio.is_some() {
        pruned.shallow_clone().f_copy_(&keep.f_logical_not()?)?;
    }
    Ok(squares.f_sum_dim_intlist([1_i64].as_slice(), false, Kind::Double)?)
}
