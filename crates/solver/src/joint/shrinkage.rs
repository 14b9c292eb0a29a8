//! The choice of a dampening from the number of vectors.

use squeeze_base::error::Result;
use squeeze_numerics::sum::{squares, sum};
use tch::Tensor;

use super::super::triangle::Triangle;

/// The dampening that makes H the best estimate of its limit for many vectors, among the estimates
/// of the form (1 - r) H + r mean(diag H) I.
///
/// It is the oracle approximating shrinkage of Chen, Wiesel, Eldar and Hero ("Shrinkage algorithms
/// for MMSE covariance estimation", 2010, eq. 23), as a share of the diagonal's mean: r / (1 - r).
/// It is about effective rank / vectors, and at most 10.
pub(super) fn shrinkage(h: &Triangle, vectors: u64) -> Result<f64> {
    let d = h.dimension() as f64;
    let trace = sum(&Tensor::f_cat(&h.diagonals()?, 0)?)?;
    let mut energy = 0.0;
    for index in 0..h.count() {
        let rows = h.rows(index);
        energy += squares(&h.corner(index)?)?;
        if rows.end < h.dimension() {
            energy += 2.0 * squares(&h.part(index, rows.end..h.dimension())?)?;
        }
    }
    Ok(ratio(trace, energy, d, vectors as f64))
}

fn ratio(trace: f64, squares: f64, d: f64, vectors: f64) -> f64 {
    let spread = squares - trace * trace / d;
    if !(trace.is_finite() && squares.is_finite()) || spread <= 0.0 {
        // One input, or inputs that are all equally large and uncorrelated: there is nothing to
        // shrink.
        return 0.0;
    }
    let shrink = ((1.0 - 2.0 / d) * squares + trace * trace) / ((vectors + 1.0 - 2.0 / d) * spread);
    if shrink < 1.0 { (shrink / (1.0 - shrink)).min(MOST) } else { MOST }
}

/// The largest useful dampening: with more, the solution is the original weight.
const MOST: f64 = 10.0;

#[cfg(test)]
mod tests {
    use super::ratio;

    #[test]
    fn many_vectors_need_none_and_few_need_much() {
        // Ten equal directions of a thousand: effective rank 10.
        let of = |vectors| ratio(10.0, 10.0, 1000.0, vectors);
        assert!((of(1e5) - 1.1e-4).abs() < 1e-5, "{}", of(1e5));
        assert!(of(100.0) > 0.1 && of(100.0) < 0.14, "{}", of(100.0));
        assert_eq!(of(1.0), 10.0);
        assert_eq!(ratio(5.0, 25.0, 1.0, 3.0), 0.0);
        assert_eq!(ratio(f64::INFINITY, 25.0, 1.0, 3.0), 0.0);
    }
}
