//! The Cholesky factor and the inverse of one small block on a diagonal, in fp64 on one thread.
//!
//! The rounding of LAPACK's routines depends on the number of threads, on some processors even for
//! small matrices. For blocks of this size, plain loops take little time compared with the products
//! of the larger blocks.

/// The rows of the largest block that these functions are used for.
pub(super) const LEAF: i64 = 64;

/// Turns the upper triangle of H [n, n], row-major, into R, upper triangular with H = R R^T.
/// Entries below the diagonal are not read and become zero. Returns false if H is not positive
/// definite; the content of `h` is then meaningless.
pub(super) fn factor(h: &mut [f64], n: usize) -> bool {
    for j in (0..n).rev() {
        let tail: f64 = (j + 1..n).map(|k| h[j * n + k] * h[j * n + k]).sum();
        let pivot = h[j * n + j] - tail;
        // False for NaN, too.
        if !(pivot > 0.0 && pivot.is_finite()) {
            return false;
        }
        let root = pivot.sqrt();
        h[j * n + j] = root;
        for i in 0..j {
            let done: f64 = (j + 1..n).map(|k| h[i * n + k] * h[j * n + k]).sum();
            h[i * n + j] = (h[i * n + j] - done) / root;
        }
        h[j * n..j * n + j].fill(0.0);
    }
    true
}

/// The inverse of an upper triangular R [n, n], row-major, with zeros below the diagonal. The
/// entries of R there are not read.
pub(super) fn inverse(r: &[f64], n: usize) -> Vec<f64> {
    let mut inverse = vec![0.0; n * n];
    for j in 0..n {
        inverse[j * n + j] = 1.0 / r[j * n + j];
        for i in (0..j).rev() {
            let sum: f64 = (i + 1..=j).map(|k| r[i * n + k] * inverse[k * n + j]).sum();
            inverse[i * n + j] = -sum / r[i * n + i];
        }
    }
    inverse
}

#[cfg(test)]
mod tests {
    use super::*;

    fn product(a: &[f64], b: &dyn Fn(usize, usize) -> f64, n: usize) -> Vec<f64> {
        let at = |i: usize, j: usize| (0..n).map(|k| a[i * n + k] * b(k, j)).sum();
        (0..n * n).map(|place| at(place / n, place % n)).collect()
    }

    #[test]
    fn factors_and_inverts_by_definition() {
        for n in [1, 2, 3, 17, 64] {
            // A A^T + 1 for a matrix of no structure.
            let a: Vec<f64> = (0..n * n).map(|i| ((i * 7919 + 13) % 101) as f64 / 50.0 - 1.0).collect();
            let mut h = product(&a, &|k, j| a[j * n + k], n);
            (0..n).for_each(|i| h[i * n + i] += 1.0);
            let mut r = h.clone();
            // Entries below the diagonal must have no influence.
            (0..n).for_each(|i| r[i * n..i * n + i].fill(f64::NAN));
            assert!(factor(&mut r, n));
            let back = product(&r, &|k, j| r[j * n + k], n);
            assert!(back.iter().zip(&h).all(|(back, h)| (back - h).abs() < 1e-10 * n as f64), "{n}");
            let inverse = inverse(&r, n);
            let one = product(&r, &|k, j| inverse[k * n + j], n);
            let exact = |place: usize| f64::from(u8::from(place / n == place % n));
            assert!(one.iter().enumerate().all(|(place, one)| (one - exact(place)).abs() < 1e-9), "{n}");
        }
    }

    #[test]
    fn what_is_not_positive_definite_has_no_factor() {
        assert!(!factor(&mut [0.0], 1));
        assert!(!factor(&mut [-1.0], 1));
        assert!(!factor(&mut [f64::NAN], 1));
        assert!(!factor(&mut [f64::INFINITY], 1));
        assert!(!factor(&mut [1.0, 2.0, 2.0, 1.0], 2));
    }
}
