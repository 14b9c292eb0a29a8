//! The Cholesky factor of H, from which SparseGPT computes the changes of weights that compensate
//! for the change of another one.

use squeeze_base::error::{Error, Result};
use squeeze_numerics::device::factors_matrices;
use squeeze_numerics::finite::{are_finite, is_finite};
use squeeze_numerics::product::{product, subtract_product};
use squeeze_numerics::sum::sum;
use tch::{Device, Kind, Tensor};

use super::Hessian;
use super::leaf;
use super::matrix::{block, copy, panels, to_vec};
use super::triangle::Triangle;

/// The rows of the blocks that are not divided further: the size of [`leaf`] on a CPU. On a GPU the
/// blocks are larger, because a call of libtorch's routines costs more than the arithmetic.
fn smallest(device: Device) -> i64 {
    if device == Device::Cpu { leaf::LEAF } else { 512 }
}

/// The largest dampening that is tried.
const MOST_DAMPENING: f64 = 10.0;

/// R [d, d], upper triangular, with R R^T = H + damping, fp32.
///
/// H is treated as coremltools treats it (`SparseGPT._compress_impl`): dead columns (H_jj = 0) get
/// H_jj = 1, then `dampening` * mean(diag H) is added to the diagonal.
///
/// SparseGPT is written with U = R^-1, the upper Cholesky factor of H^-1, for which coremltools
/// makes three factorizations. R carries the same information with one factorization: if D [o, d]
/// is the change of the columns already processed, the errors e = (w - q) / U_jj that are fed back
/// to column j sum to (D R)_j. Only blocks on the diagonal of R are inverted instead of a whole [d,
/// d] matrix, which takes a quarter of the work and is better conditioned.
#[derive(Debug)]
pub struct Factor {
    /// R.
    pub(super) triangle: Triangle,
    /// The columns whose inputs were always zero: bool, of length d.
    pub dead: Tensor,
    /// The number of dead columns.
    pub dead_columns: u64,
    /// The dampening with which the factorization succeeded: the requested one times a power of
    /// ten.
    pub dampening: f64,
    /// The number that the dampening adds to each entry of H's diagonal.
    pub added: f64,
}

impl Factor {
    /// The factor of each of a Hessian's groups.
    ///
    /// # Errors
    /// As [`Factor::new`].
    pub fn all(hessian: &Hessian, dampening: f64) -> Result<Vec<Self>> {
        (0..hessian.groups()).map(|group| Self::new(hessian, group, dampening)).collect()
    }

    /// Factors the H of one group. If the factorization fails, it is repeated with ten times the
    /// dampening, up to 10 (from 1e-6 on if the requested dampening is zero).
    ///
    /// # Errors
    /// [`Error::Argument`] if nothing was added to the Hessian, or for a dampening below zero;
    /// [`Error::NotFinite`] if its inputs were so large that their squares overflow fp32;
    /// [`Error::NotPositiveDefinite`] if no dampening helps.
    pub fn new(hessian: &Hessian, group: i64, dampening: f64) -> Result<Self> {
        Self::check(hessian, dampening)?;
        Self::of(&|| hessian.triangle(group), dampening)
    }

    /// The factor on `device`, with the same memory where it is there already.
    ///
    /// # Errors
    /// [`Error::Torch`] if the memory is not there.
    pub fn to_device(&self, device: Device) -> Result<Self> {
        Ok(Factor { triangle: self.triangle.to_device(device)?, dead: self.dead.f_to_device(device)?, ..*self })
    }

    /// R_jj = 1 / U_jj. Its square is the cost of an error in column j when the columns after it
    /// compensate.
    pub(super) fn diagonal(&self) -> Result<Vec<f32>> {
        to_vec(&Tensor::f_cat(&self.triangle.diagonals()?, 0)?)
    }

    /// X (H + damping)^-1 for X [rows, d], on the factor's device. Zeros in dead columns.
    pub(super) fn solve(&self, x: &Tensor) -> Result<Tensor> {
        let r = &self.triangle;
        let x = x.f_masked_fill(&self.dead, 0.0)?;
        let part = |columns: std::ops::Range<i64>| x.f_narrow(1, columns.start, columns.end - columns.start);
        // Solves Y R^T = X from the last columns to the first, then Z R = Y from the first on.
        for index in (0..r.count()).rev() {
            let (rows, after) = (r.rows(index), r.rows(index).end..r.dimension());
            let mut target = part(rows)?;
            if !after.is_empty() {
                subtract_product(&target, &part(after.clone())?, &r.part(index, after)?.f_transpose(0, 1)?)?;
            }
            target.f_copy_(&product(&target, &inverse(&r.corner(index)?)?.f_transpose(0, 1)?)?)?;
        }
        for index in 0..r.count() {
            let (rows, after) = (r.rows(index), r.rows(index).end..r.dimension());
            let mut target = part(rows)?;
            target.f_copy_(&product(&target, &inverse(&r.corner(index)?)?)?)?;
            if !after.is_empty() {
                subtract_product(&part(after.clone())?, &target, &r.part(index, after)?)?;
            }
        }
        Ok(x.f_masked_fill(&self.dead, 0.0)?)
    }

    /// The diagonal of (H + damping)^-1: the squared norms of the columns of R^-1, which is
    /// computed one panel at a time.
    pub(super) fn inverse_diagonal(&self) -> Result<Vec<f32>> {
        let _span = tracing::debug_span!("inverse diagonal").entered();
        let r = &self.triangle;
        let corners = (0..r.count()).map(|index| inverse(&r.corner(index)?)).collect::<Result<Vec<_>>>()?;
        let mut diagonal = Vec::new();
        for last in 0..r.count() {
            let columns = r.rows(last);
            let size = [columns.end, columns.end - columns.start];
            let solved = Tensor::f_zeros(size, (Kind::Float, r.device()))?;
            let part = |rows: std::ops::Range<i64>| solved.f_narrow(0, rows.start, rows.end - rows.start);
            part(columns.clone())?.f_copy_(&corners[last])?;
            for index in (0..last).rev() {
                let (rows, below) = (r.rows(index), r.rows(index).end..columns.end);
                let sum = product(&r.part(index, below.clone())?, &part(below)?)?;
                part(rows)?.f_copy_(&product(&corners[index], &sum)?.f_neg_()?)?;
            }
            let squares = solved.f_square()?.f_sum_dim_intlist([0_i64].as_slice(), false, Kind::Float)?;
            diagonal.push(squares);
        }
        to_vec(&Tensor::f_cat(&diagonal, 0)?)
    }

    /// Checks that the dampening is in range and the Hessian has inputs.
    pub(super) fn check(hessian: &Hessian, dampening: f64) -> Result<()> {
        if !(dampening.is_finite() && dampening >= 0.0) {
            return Err(Error::range("the dampening", dampening, "zero or above"));
        }
        if hessian.vectors() == 0 {
            return Err(Error::State("no input was added to the Hessian".into()));
        }
        Ok(())
    }

    /// The factor of the H that `copy` returns; each call must return a new copy.
    pub(super) fn of(copy: &dyn Fn() -> Result<Triangle>, dampening: f64) -> Result<Self> {
        let _span = tracing::debug_span!("factor").entered();
        let mut used = dampening;
        loop {
            if let Some(factor) = Self::with_dampening(copy()?, used)? {
                return Ok(factor);
            }
            let more = if used == 0.0 { 1e-6 } else { used * 10.0 };
            // The tolerance is for rounding: 0.01 times ten is not exactly 0.1.
            if more > MOST_DAMPENING * (1.0 + 1e-9) {
                return Err(Error::NotPositiveDefinite { dampening: used });
            }
            used = more;
        }
    }

    fn with_dampening(triangle: Triangle, dampening: f64) -> Result<Option<Self>> {
        let diagonals = triangle.diagonals()?;
        let mut diagonal = Tensor::f_cat(&diagonals, 0)?;
        // In a sum of x x^T no entry is larger than the largest one on the diagonal.
        if !is_finite(&diagonal)? {
            let problem = match triangle.device() {
                Device::Cpu => "the squares of the layer's inputs overflow fp32",
                _ => "the layer's inputs have NaN or infinite values in them, or their squares overflow fp32",
            };
            return Err(Error::NotFinite(problem.into()));
        }
        let dead = diagonal.f_eq(0.0)?;
        let _ = diagonal.f_masked_fill_(&dead, 1.0)?;
        let added = dampening * sum(&diagonal)? / diagonal.numel() as f64;
        let _ = diagonal.f_add_scalar_(added)?;
        let mut start = 0;
        for mut part in diagonals {
            let length = part.size1()?;
            part.f_copy_(&diagonal.f_narrow(0, start, length)?)?;
            start += length;
        }
        let device = triangle.device();
        let mut triangle = triangle;
        if !factors_matrices(device) {
            triangle = triangle.to_device(Device::Cpu)?;
        }
        if !factor(&triangle)? {
            return Ok(None);
        }
        let triangle = triangle.to_device(device)?;
        if !are_finite((0..triangle.count()).map(|index| triangle.panel(index)))? {
            return Ok(None);
        }
        let dead_columns = dead.f_sum(Kind::Int64)?.f_int64_value(&[])?.unsigned_abs();
        Ok(Some(Factor { triangle, dead, dead_columns, dampening, added }))
    }

    /// R [d, d] as one matrix, zeros below the diagonal: a copy.
    ///
    /// # Errors
    /// [`Error::Torch`] if the memory is not there.
    pub fn upper(&self) -> Result<Tensor> {
        self.triangle.upper()
    }
}

/// Turns the upper triangle of H into R, upper triangular with H = R R^T; false if H is not
/// positive definite.
///
/// With J the matrix that reverses the order, R = J L J for J H J = L L^T. The blocks are computed
/// in place, row by row from the last row up, from the last block of a row to the diagonal one.
/// From each block, the products of the blocks already computed are subtracted.
fn factor(h: &Triangle) -> Result<bool> {
    // Inverses of the diagonal blocks, the last block first.
    let mut inverses: Vec<Tensor> = Vec::new();
    for row in (0..h.count()).rev() {
        let rows = h.rows(row);
        for (column, inverse) in (row + 1..h.count()).rev().zip(&inverses) {
            let columns = h.rows(column);
            let done = columns.end..h.dimension();
            let target = h.part(row, columns)?;
            if !done.is_empty() {
                subtract_product(&target, &h.part(row, done.clone())?, &h.part(column, done)?.f_transpose(0, 1)?)?;
            }
            divide(&target, inverse)?;
        }
        let corner = h.corner(row)?;
        if rows.end < h.dimension() {
            let done = h.part(row, rows.end..h.dimension())?;
            subtract_product(&corner, &done, &done.f_transpose(0, 1)?)?;
        }
        if !factor_in_place(&corner)? {
            return Ok(false);
        }
        if row > 0 {
            inverses.push(inverse(&corner)?);
        }
    }
    Ok(true)
}

/// Replaces T [m, n] by the solution X of X R^T = T, given the inverse of R [n, n].
fn divide(target: &Tensor, inverse: &Tensor) -> Result<()> {
    let from = copy(target)?;
    let size = inverse.size2()?.0;
    // R^-1 is upper triangular: a column of X does not depend on the columns to its left.
    for columns in panels(size, STRIP) {
        let rows = inverse.f_narrow(0, columns.start, columns.end - columns.start)?;
        let rows = rows.f_narrow(1, columns.start, size - columns.start)?;
        let solved = product(&from.f_narrow(1, columns.start, size - columns.start)?, &rows.f_transpose(0, 1)?)?;
        target.f_narrow(1, columns.start, columns.end - columns.start)?.f_copy_(&solved)?;
    }
    Ok(())
}

/// The number of columns that [`divide`] computes at once.
const STRIP: i64 = 128;

/// The column at which a triangle is split that is larger than the smallest block.
fn middle(size: i64, smallest: i64) -> i64 {
    (size / 2 + smallest - 1) / smallest * smallest
}

/// The numbers of a block on the CPU in fp64, row by row.
fn wide(block: &Tensor) -> Result<Vec<f64>> {
    Ok(Vec::try_from(&block.f_to_kind(Kind::Double)?.f_reshape([-1])?)?)
}

/// [`factor`] of one diagonal block. Entries below the diagonal are not read, and are overwritten.
fn factor_in_place(h: &Tensor) -> Result<bool> {
    let (size, smallest) = (h.size2()?.0, smallest(h.device()));
    if size <= smallest {
        let mut place = h.shallow_clone();
        if h.device() == Device::Cpu {
            let mut numbers = wide(h)?;
            let positive = leaf::factor(&mut numbers, size as usize);
            place.f_copy_(&Tensor::f_from_slice(&numbers)?.f_view([size, size])?)?;
            return Ok(positive);
        }
        let (lower, failed) = h.f_flip([0, 1])?.f_linalg_cholesky_ex(false, false)?;
        place.f_copy_(&lower.f_flip([0, 1])?)?;
        return Ok(failed.f_int64_value(&[])? == 0);
    }
    let middle = middle(size, smallest);
    let first = block(h, 0..middle, 0..middle)?;
    let corner = block(h, 0..middle, middle..size)?;
    let last = block(h, middle..size, middle..size)?;
    if !factor_in_place(&last)? {
        return Ok(false);
    }
    divide(&corner, &inverse(&last)?)?;
    subtract_product(&first, &corner, &corner.f_transpose(0, 1)?)?;
    factor_in_place(&first)
}

/// The inverse of an upper triangular R [n, n], with zeros below the diagonal. The entries of R
/// there are not read.
pub(super) fn inverse(r: &Tensor) -> Result<Tensor> {
    if !factors_matrices(r.device()) {
        return Ok(inverse(&r.f_to_device(Device::Cpu)?)?.f_to_device(r.device())?);
    }
    let (size, smallest) = (r.size2()?.0, smallest(r.device()));
    if size <= smallest && r.device() == Device::Cpu {
        let inverse = leaf::inverse(&wide(r)?, size as usize);
        return Ok(Tensor::f_from_slice(&inverse)?.f_view([size, size])?.f_to_kind(r.f_kind()?)?);
    }
    if size <= smallest {
        let unit = Tensor::f_eye(size, (r.f_kind()?, r.device()))?;
        return Ok(r.f_linalg_solve_triangular(&unit, true, true, false)?);
    }
    let middle = middle(size, smallest);
    let whole = Tensor::f_zeros([size, size], (r.f_kind()?, r.device()))?;
    let first = inverse(&block(r, 0..middle, 0..middle)?)?;
    let last = inverse(&block(r, middle..size, middle..size)?)?;
    let corner = product(&product(&first, &block(r, 0..middle, middle..size)?)?, &last)?.f_neg_()?;
    block(&whole, 0..middle, 0..middle)?.f_copy_(&first)?;
    block(&whole, 0..middle, middle..size)?.f_copy_(&corner)?;
    block(&whole, middle..size, middle..size)?.f_copy_(&last)?;
    Ok(whole)
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
        let random = |rows, seed| squeeze_numerics::random::noise(&[rows, d], seed, Kind::Double).unwrap();
        let inputs = random(2 * d + 7, 1).matmul(&random(d, 2));
        let h = inputs.tr().matmul(&inputs) / d as f64;
        let damping = 0.01 * h.diagonal(0, 0, 1).mean(Kind::Double).double_value(&[]);
        (h + damping * Tensor::eye(d, (Kind::Double, Device::Cpu))).to_kind(kind)
    }

    fn ours(h: &Tensor) -> Factor {
        let triangle = || {
            let triangle = Triangle::zeros(h.size()[0], 1, Device::Cpu).unwrap();
            for index in 0..triangle.count() {
                let rows = triangle.rows(index);
                // Entries below the diagonal must have no influence.
                let rows =
                    h.narrow(0, rows.start, rows.end - rows.start).narrow(1, rows.start, triangle.dimension() - rows.start);
                triangle.panel(index).shallow_clone().copy_(&(rows.triu(0) + 7.0 * rows.ones_like().tril(-1)));
            }
            Ok(triangle)
        };
        Factor::of(&triangle, 0.0).unwrap()
    }

    /// coremltools' chain, which gives U.
    fn reference(h: &Tensor) -> Tensor {
        h.linalg_cholesky(false).cholesky_inverse(false).linalg_cholesky(true)
    }

    #[test]
    fn is_the_inverse_of_the_chain_of_three_factorizations() {
        for d in [1, 2, 63, 64, 65, 128, 129, 200, 577, 1100, 1800] {
            let h = damped(d, Kind::Double);
            let exact = reference(&h);
            let theirs = relative(&reference(&h.to_kind(Kind::Float)).to_kind(Kind::Double), &exact);
            let factor = ours(&h.to_kind(Kind::Float));
            let upper = factor.upper().unwrap();
            let inverted = inverse(&upper).unwrap();
            let ours = relative(&inverted.to_kind(Kind::Double), &exact);
            assert!(ours < 1e-4 && ours < 2.0 * theirs + 1e-5, "{d}: {ours:.1e}, the chain {theirs:.1e}");
            let back = relative(&upper.matmul(&upper.tr()).to_kind(Kind::Double), &h);
            assert!(back < 1e-5, "{d}: R R^T is off by {back:.1e}");
        }
    }

    #[test]
    fn solves_and_knows_the_inverses_diagonal() {
        for d in [1, 65, 200, 577, 1100] {
            let h = damped(d, Kind::Double);
            let factor = ours(&h.to_kind(Kind::Float));
            let exact = h.inverse();
            let diagonal = Tensor::from_slice(&factor.inverse_diagonal().unwrap()).to_kind(Kind::Double);
            let off = relative(&diagonal, &exact.diagonal(0, 0, 1));
            assert!(off < 1e-4, "{d}: the inverse's diagonal is off by {off:.1e}");
            let x = squeeze_numerics::random::noise(&[9, d], 3, Kind::Double).unwrap();
            let solved = factor.solve(&x.to_kind(Kind::Float)).unwrap().to_kind(Kind::Double);
            let off = relative(&solved.matmul(&h), &x);
            assert!(off < 1e-3, "{d}: X H^-1 H is off by {off:.1e}");
        }
    }
}
