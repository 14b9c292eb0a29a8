//! The share and pattern of pruned weights.

use std::fmt::{self, Display};

use squeeze_base::error::{Error, Result};

/// The share and pattern of the weights that become zero.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Sparsity {
    /// This share of the elements, 0 <= s < 1, wherever they are (coremltools' `target_sparsity`).
    /// Zero prunes nothing.
    Unstructured(f64),
    /// n of every m neighbours in a row of the flattened weight [o, d] (coremltools' `n_m_ratio`).
    NOfM(NmRatio),
}

/// Of every `m` neighbouring weights of a row, `n` are zero; 1 <= n < m.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NmRatio {
    /// The number of zeros in a group.
    pub n: usize,
    /// The number of weights in a group.
    pub m: usize,
}

impl Sparsity {
    /// The share of zeros asked for: n / m, or the share itself.
    #[must_use]
    pub fn target(self) -> f64 {
        match self {
            Sparsity::Unstructured(share) => share,
            Sparsity::NOfM(NmRatio { n, m }) => n as f64 / m as f64,
        }
    }

    /// The share of zeros in a row of `columns` weights. An incomplete last group of m stays dense.
    #[must_use]
    pub fn share(self, columns: usize) -> f64 {
        match self {
            Sparsity::Unstructured(share) => share,
            Sparsity::NOfM(NmRatio { n, m }) => (columns / m * n) as f64 / columns as f64,
        }
    }

    /// Checks that the numbers are in range.
    ///
    /// # Errors
    /// [`Error::Range`] for a share outside [0, 1), or for n outside [1, m).
    pub fn check(self) -> Result<()> {
        match self {
            Sparsity::Unstructured(share) if !(0.0..1.0).contains(&share) => {
                Err(Error::range("the sparsity", share, "at least 0 and below 1"))
            }
            Sparsity::NOfM(NmRatio { n, m }) if n == 0 || n >= m => {
                Err(Error::range("the sparsity", format!("{n}:{m}"), "at least 1 and fewer than all of m"))
            }
            Sparsity::Unstructured(_) | Sparsity::NOfM(_) => Ok(()),
        }
    }
}

impl Display for Sparsity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Sparsity::Unstructured(share) => write!(f, "{share:?}"),
            Sparsity::NOfM(NmRatio { n, m }) => write!(f, "{n}:{m}"),
        }
    }
}
