//! The upper Cholesky factor of H^-1, in which SparseGPT reads what a change of one weight does to the others.

use tch::{Kind, Tensor};

use super::Hessian;
use super::matrix::{block, panels};
use crate::error::{Error, Result};

/// Blocks of this size go to LAPACK. Its own Cholesky of larger ones rounds otherwise on another number of threads.
const LEAF: i64 = 64;

/// Columns that one product of a symmetric update fills.
const PANEL: i64 = 512;

/// The most dampening that is tried.
const MOST_DAMPENING: f64 = 10.0;

/// U [d, d] with U^T U = (H + damping)^-1, upper triangular, fp32.
///
/// H is treated as coremltools treats it (`SparseGPT._compress_impl`): dead columns (H_jj = 0) get H_jj = 1, then
/// `dampening` * mean(diag H) is added to the diagonal. coremltools inverts H between two Cholesky factorizations. Here H = R R^T
/// is factored with R upper triangular, and U = R^-1: half the work, the same matrix, better conditioned.
#[derive(Debug)]
pub struct InverseFactor {
    /// U [d, d]; zeros below the diagonal.
    pub upper: Tensor,
    /// The columns whose inputs were always zero: bool, of length d.
    pub dead: Tensor,
    /// How many of them there are.
    pub dead_columns: u64,
    /// The dampening with which the factorization worked: what was asked for, or ten, a hundred, ... times as much.
    pub dampening: f64,
}

impl InverseFactor {
    /// Factors one group's H; where that fails it tries again with ten times the dampening, to at most 10 (or from 1e-6, if zero
    /// was asked for).
    ///
    /// # Errors
    /// [`Error::Argument`] if nothing was added to the Hessian, or for a dampening below zero; [`Error::NotFinite`] if its
    /// inputs were so large that their squares overflow fp32; [`Error::NotPositiveDefinite`] if no dampening helps.
    pub fn new(hessian: &Hessian, group: i64, dampening: f64) -> Result<Self> {
        if !(dampening.is_finite() && dampening >= 0.0) {
            return Err(Error::Argument(format!("a dampening of {dampening}: it must be zero or above")));
        }
        if hessian.vectors() == 0 {
            return Err(Error::Argument("a Hessian to which no input was added says nothing of the layer".into()));
        }
        let mut used = dampening;
        loop {
            if let Some(factor) = Self::with_dampening(hessian, group, used)? {
                return Ok(factor);
            }
            let more = if used == 0.0 { 1e-6 } else { used * 10.0 };
            // Ten times 0.01 is not 0.1 to the last bit.
            if more > MOST_DAMPENING * (1.0 + 1e-9) {
                return Err(Error::NotPositiveDefinite { dampening: used });
            }
            used = more;
        }
    }

    fn with_dampening(hessian: &Hessian, group: i64, dampening: f64) -> Result<Option<Self>> {
        let mut upper = hessian.upper(group)?;
        let mut diagonal = upper.f_diagonal(0, 0, 1)?;
        // Of a sum of x x^T no entry is larger than the largest on the diagonal.
        if !sum(&diagonal)?.is_finite() {
            return Err(Error::NotFinite("the squares of the layer's inputs overflow fp32".into()));
        }
        let dead = diagonal.f_eq(0.0)?;
        let _ = diagonal.f_masked_fill_(&dead, 1.0)?;
        let mean = diagonal.f_mean(Kind::Double)?.f_double_value(&[])?;
        let _ = diagonal.f_add_scalar_(dampening * mean)?;
        if !factor_in_place(&upper)? {
            return Ok(None);
        }
        invert_in_place(&upper)?;
        let _ = upper.f_triu_(0)?;
        if !sum(&upper)?.is_finite() {
            return Ok(None);
        }
        let dead_columns = dead.f_sum(Kind::Int64)?.f_int64_value(&[])?.unsigned_abs();
        Ok(Some(InverseFactor { upper, dead, dead_columns, dampening }))
    }
}

/// NaN or infinite if anything in it is; without an array of the tensor's size in between.
fn sum(tensor: &Tensor) -> Result<f64> {
    Ok(tensor.f_sum(Kind::Float)?.f_double_value(&[])?)
}

/// Where to split a triangle of more than [`LEAF`] columns.
fn middle(size: i64) -> i64 {
    (size / 2 + LEAF - 1) / LEAF * LEAF
}

/// Turns the upper triangle of H into R, upper triangular with H = R R^T; false if H is not positive definite.
///
/// With J the reversal this is J L J of J H J = L L^T, without moving the matrix. Whatever lies below the diagonal is neither
/// read nor kept.
fn factor_in_place(h: &Tensor) -> Result<bool> {
    let size = h.size2()?.0;
    if size <= LEAF {
        let (lower, failed) = h.f_flip([0, 1])?.f_linalg_cholesky_ex(false, false)?;
        let mut h = h.shallow_clone();
        h.f_copy_(&lower.f_flip([0, 1])?)?;
        return Ok(failed.f_int64_value(&[])? == 0);
    }
    let middle = middle(size);
    let first = block(h, 0..middle, 0..middle)?;
    let mut corner = block(h, 0..middle, middle..size)?;
    let last = block(h, middle..size, middle..size)?;
    if !factor_in_place(&last)? {
        return Ok(false);
    }
    corner.f_copy_(&last.f_transpose(0, 1)?.f_linalg_solve_triangular(&corner, false, false, false)?)?;
    let negative = corner.f_neg()?;
    for panel in panels(middle, PANEL) {
        let rows = negative.f_narrow(0, 0, panel.end)?;
        let columns = corner.f_narrow(0, panel.start, panel.end - panel.start)?.f_transpose(0, 1)?;
        let _ = block(&first, 0..panel.end, panel)?.f_addmm_(&rows, &columns)?;
    }
    factor_in_place(&first)
}

/// Turns the upper triangular R into R^-1. Whatever lies below the diagonal is neither read nor kept.
fn invert_in_place(r: &Tensor) -> Result<()> {
    let size = r.size2()?.0;
    if size <= LEAF {
        let unit = Tensor::f_eye(size, (r.f_kind()?, r.device()))?;
        let mut r = r.shallow_clone();
        let inverse = r.f_linalg_solve_triangular(&unit, true, true, false)?;
        return Ok(r.f_copy_(&inverse)?);
    }
    let middle = middle(size);
    let first = block(r, 0..middle, 0..middle)?;
    let mut corner = block(r, 0..middle, middle..size)?;
    let last = block(r, middle..size, middle..size)?;
    let left = first.f_linalg_solve_triangular(&corner, true, true, false)?;
    corner.f_copy_(&last.f_linalg_solve_triangular(&left, true, false, false)?.f_neg()?)?;
    invert_in_place(&first)?;
    invert_in_place(&last)
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;

    fn relative(ours: &Tensor, theirs: &Tensor) -> f64 {
        ((ours - theirs).norm() / theirs.norm()).double_value(&[])
    }

    /// A damped Hessian of correlated inputs, of `kind`.
    fn damped(d: i64, kind: Kind) -> Tensor {
        tch::manual_seed(d);
        let inputs = Tensor::randn([2 * d + 7, d], (Kind::Double, Device::Cpu))
            .matmul(&Tensor::randn([d, d], (Kind::Double, Device::Cpu)));
        let h = inputs.tr().matmul(&inputs) / d as f64;
        let damping = 0.01 * h.diagonal(0, 0, 1).mean(Kind::Double).double_value(&[]);
        (h + damping * Tensor::eye(d, (Kind::Double, Device::Cpu))).to_kind(kind)
    }

    fn ours(h: &Tensor) -> Tensor {
        // What lies below the diagonal must not matter.
        let h = h.triu(0) + 7.0 * h.ones_like().tril(-1);
        assert!(factor_in_place(&h).unwrap());
        invert_in_place(&h).unwrap();
        h.triu(0)
    }

    /// coremltools' chain.
    fn reference(h: &Tensor) -> Tensor {
        h.linalg_cholesky(false).cholesky_inverse(false).linalg_cholesky(true)
    }

    #[test]
    fn equals_the_chain_of_three_factorizations() {
        for d in [1, 2, 63, 64, 65, 128, 129, 200, 577] {
            let h = damped(d, Kind::Double);
            let exact = reference(&h);
            assert!(relative(&ours(&h), &exact) < 1e-12, "{d}");
            let h = damped(d, Kind::Float);
            assert!(relative(&ours(&h), &reference(&h)) < 1e-4, "{d}");
        }
    }
}
