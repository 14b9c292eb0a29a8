//! The upper Cholesky factor of H^-1, in which SparseGPT reads what a change of one weight does to the others.

use tch::{Device, Kind, Tensor};

use super::Hessian;
use super::matrix::block;
use super::triangle::Triangle;
use crate::error::{Error, Result};
use crate::product::{add_product, product, subtract_product};

/// On a CPU, blocks of this size go to LAPACK: its own Cholesky of larger ones rounds otherwise on another number of threads. On a GPU
/// each call costs more than a whole panel's work.
fn leaf(device: Device) -> i64 {
    if device == Device::Cpu { 64 } else { 512 }
}

/// The most dampening that is tried.
const MOST_DAMPENING: f64 = 10.0;

/// U [d, d] with U^T U = (H + damping)^-1, upper triangular, fp32.
///
/// H is treated as coremltools treats it (`SparseGPT._compress_impl`): dead columns (H_jj = 0) get H_jj = 1, then
/// `dampening` * mean(diag H) is added to the diagonal. coremltools inverts H between two Cholesky factorizations. Here H = R R^T
/// is factored with R upper triangular, and U = R^-1: half the work, the same matrix, better conditioned.
#[derive(Debug)]
pub struct InverseFactor {
    /// U, upper triangular.
    pub(super) triangle: Triangle,
    /// The columns whose inputs were always zero: bool, of length d.
    pub dead: Tensor,
    /// How many of them there are.
    pub dead_columns: u64,
    /// The dampening with which the factorization worked: what was asked for, or ten, a hundred, ... times as much.
    pub dampening: f64,
    /// What that added to each entry of H's diagonal.
    pub added: f64,
}

impl InverseFactor {
    /// The factor of each of a Hessian's groups.
    ///
    /// # Errors
    /// As [`InverseFactor::new`].
    pub fn all(hessian: &Hessian, dampening: f64) -> Result<Vec<Self>> {
        (0..hessian.groups()).map(|group| Self::new(hessian, group, dampening)).collect()
    }

    /// Factors one group's H; where that fails it tries again with ten times the dampening, to at most 10 (or from 1e-6, if zero
    /// was asked for).
    ///
    /// # Errors
    /// [`Error::Argument`] if nothing was added to the Hessian, or for a dampening below zero; [`Error::NotFinite`] if its
    /// inputs were so large that their squares overflow fp32; [`Error::NotPositiveDefinite`] if no dampening helps.
    pub fn new(hessian: &Hessian, group: i64, dampening: f64) -> Result<Self> {
        Self::check(hessian, dampening)?;
        Self::of(&|| hessian.triangle(group), dampening)
    }

    /// X (H + damping)^-1 for X [rows, d], on the factor's device. Zeros in dead columns.
    pub(super) fn solve(&self, x: &Tensor) -> Result<Tensor> {
        let u = &self.triangle;
        let d = u.dimension();
        let x = x.f_masked_fill(&self.dead, 0.0)?;
        let solved = x.f_zeros_like()?;
        for index in 0..u.count() {
            let rows = u.rows(index);
            let panel = u.panel(index).f_triu(0)?;
            let part = product(&x.f_narrow(1, rows.start, d - rows.start)?, &panel.f_transpose(0, 1)?)?;
            add_product(&solved.f_narrow(1, rows.start, d - rows.start)?, &part, &panel)?;
        }
        Ok(solved.f_masked_fill(&self.dead, 0.0)?)
    }

    /// Whether there can be a factor.
    pub(super) fn check(hessian: &Hessian, dampening: f64) -> Result<()> {
        if !(dampening.is_finite() && dampening >= 0.0) {
            return Err(Error::Argument(format!("a dampening of {dampening}: it must be zero or above")));
        }
        if hessian.vectors() == 0 {
            return Err(Error::Argument("a Hessian to which no input was added says nothing of the layer".into()));
        }
        Ok(())
    }

    /// The factor of what `copy` gives, a new copy of the same H each time.
    pub(super) fn of(copy: &dyn Fn() -> Result<Triangle>, dampening: f64) -> Result<Self> {
        let mut used = dampening;
        loop {
            if let Some(factor) = Self::with_dampening(copy()?, used)? {
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

    fn with_dampening(triangle: Triangle, dampening: f64) -> Result<Option<Self>> {
        let diagonals = triangle.diagonals()?;
        let mut diagonal = Tensor::f_cat(&diagonals, 0)?;
        // Of a sum of x x^T no entry is larger than the largest on the diagonal.
        if !sum(&diagonal)?.is_finite() {
            return Err(Error::NotFinite("the squares of the layer's inputs overflow fp32".into()));
        }
        let dead = diagonal.f_eq(0.0)?;
        let _ = diagonal.f_masked_fill_(&dead, 1.0)?;
        let added = dampening * diagonal.f_mean(Kind::Double)?.f_double_value(&[])?;
        let _ = diagonal.f_add_scalar_(added)?;
        let mut start = 0;
        for mut part in diagonals {
            let length = part.size1()?;
            part.f_copy_(&diagonal.f_narrow(0, start, length)?)?;
            start += length;
        }
        if !factor(&triangle)? {
            return Ok(None);
        }
        invert(&triangle)?;
        for index in 0..triangle.count() {
            if !sum(triangle.panel(index))?.is_finite() {
                return Ok(None);
            }
        }
        let dead_columns = dead.f_sum(Kind::Int64)?.f_int64_value(&[])?.unsigned_abs();
        Ok(Some(InverseFactor { triangle, dead, dead_columns, dampening, added }))
    }

    /// U [d, d] as one matrix, zeros below the diagonal: a copy.
    ///
    /// # Errors
    /// [`Error::Torch`] if the memory is not there.
    pub fn upper(&self) -> Result<Tensor> {
        self.triangle.upper()
    }
}

/// Turns the upper triangle of H into R, upper triangular with H = R R^T; false if H is not positive definite.
///
/// With J the reversal this is J L J of J H J = L L^T, without moving the matrix: row by row of blocks from the last one up, in a row
/// from the last block to the first, each less the products of what is done already.
fn factor(h: &Triangle) -> Result<bool> {
    for row in (0..h.count()).rev() {
        let own = h.rows(row);
        for column in (row + 1..h.count()).rev() {
            let other = h.rows(column);
            let done = other.end..h.dimension();
            let mut target = h.part(row, other.clone())?;
            if !done.is_empty() {
                subtract_product(&target, &h.part(row, done.clone())?, &h.part(column, done)?.f_transpose(0, 1)?)?;
            }
            // X R^T = target, for X.
            let lower = h.corner(column)?.f_transpose(0, 1)?;
            target.f_copy_(&lower.f_linalg_solve_triangular(&target, false, false, false)?)?;
        }
        let corner = h.corner(row)?;
        if own.end < h.dimension() {
            let done = h.part(row, own.end..h.dimension())?;
            subtract_product(&corner, &done, &done.f_transpose(0, 1)?)?;
        }
        if !factor_in_place(&corner)? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Turns the upper triangular R into R^-1, row by row of blocks from the last one up; zeros below the diagonal.
fn invert(r: &Triangle) -> Result<()> {
    for row in (0..r.count()).rev() {
        let own = r.rows(row);
        let mut corner = r.corner(row)?;
        invert_in_place(&corner)?;
        let _ = corner.f_triu_(0)?;
        if own.end == r.dimension() {
            continue;
        }
        let after = own.end..r.dimension();
        let sum = Tensor::f_zeros([own.end - own.start, after.end - after.start], (Kind::Float, r.device()))?;
        for other in row + 1..r.count() {
            let columns = r.rows(other);
            let place = sum.f_narrow(1, columns.start - own.end, r.dimension() - columns.start)?;
            add_product(&place, &r.part(row, columns)?, r.panel(other))?;
        }
        r.part(row, after)?.f_copy_(&product(&corner, &sum)?.f_neg_()?)?;
    }
    Ok(())
}

/// NaN or infinite if anything in it is; without an array of the tensor's size in between.
fn sum(tensor: &Tensor) -> Result<f64> {
    Ok(tensor.f_sum(Kind::Float)?.f_double_value(&[])?)
}

/// Where to split a triangle of more than a leaf's columns.
fn middle(size: i64, leaf: i64) -> i64 {
    (size / 2 + leaf - 1) / leaf * leaf
}

/// [`factor`] of one diagonal block. Whatever lies below the diagonal is neither read nor kept.
fn factor_in_place(h: &Tensor) -> Result<bool> {
    let (size, leaf) = (h.size2()?.0, leaf(h.device()));
    if size <= leaf {
        let (lower, failed) = h.f_flip([0, 1])?.f_linalg_cholesky_ex(false, false)?;
        let mut h = h.shallow_clone();
        h.f_copy_(&lower.f_flip([0, 1])?)?;
        return Ok(failed.f_int64_value(&[])? == 0);
    }
    let middle = middle(size, leaf);
    let first = block(h, 0..middle, 0..middle)?;
    let mut corner = block(h, 0..middle, middle..size)?;
    let last = block(h, middle..size, middle..size)?;
    if !factor_in_place(&last)? {
        return Ok(false);
    }
    corner.f_copy_(&last.f_transpose(0, 1)?.f_linalg_solve_triangular(&corner, false, false, false)?)?;
    subtract_product(&first, &corner, &corner.f_transpose(0, 1)?)?;
    factor_in_place(&first)
}

/// [`invert`] of one diagonal block. Whatever lies below the diagonal is neither read nor kept.
fn invert_in_place(r: &Tensor) -> Result<()> {
    let (size, leaf) = (r.size2()?.0, leaf(r.device()));
    if size <= leaf {
        let unit = Tensor::f_eye(size, (r.f_kind()?, r.device()))?;
        let mut r = r.shallow_clone();
        let inverse = r.f_linalg_solve_triangular(&unit, true, true, false)?;
        return Ok(r.f_copy_(&inverse)?);
    }
    let middle = middle(size, leaf);
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
        let triangle = Triangle::zeros(h.size()[0], 1, Device::Cpu).unwrap();
        for index in 0..triangle.count() {
            let rows = triangle.rows(index);
            // What lies below the diagonal must not matter.
            let rows = h.narrow(0, rows.start, rows.end - rows.start).narrow(1, rows.start, triangle.dimension() - rows.start);
            triangle.panel(index).shallow_clone().copy_(&(rows.triu(0) + 7.0 * rows.ones_like().tril(-1)));
        }
        assert!(factor(&triangle).unwrap());
        invert(&triangle).unwrap();
        triangle.upper().unwrap()
    }

    /// coremltools' chain.
    fn reference(h: &Tensor) -> Tensor {
        h.linalg_cholesky(false).cholesky_inverse(false).linalg_cholesky(true)
    }

    #[test]
    fn equals_the_chain_of_three_factorizations() {
        for d in [1, 2, 63, 64, 65, 128, 129, 200, 577, 1100] {
            let h = damped(d, Kind::Double);
            let exact = reference(&h);
            let theirs = relative(&reference(&h.to_kind(Kind::Float)).to_kind(Kind::Double), &exact);
            let ours = relative(&ours(&h.to_kind(Kind::Float)).to_kind(Kind::Double), &exact);
            assert!(ours < 1e-4 && ours < 2.0 * theirs + 1e-5, "{d}: {ours:.1e}, the chain {theirs:.1e}");
        }
    }
}
