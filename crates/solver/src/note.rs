//! Notes for the user about the compression of a weight, as data.

use std::fmt;

/// A deviation from the requested compression of a weight, or a reason to doubt its result. The
/// caller adds the layer's name.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Note {
    /// The Hessian was built from fewer vectors than it has columns. Without dampening it is
    /// singular, and the result overfits the calibration inputs.
    FewVectors {
        /// Vectors seen.
        vectors: u64,
        /// Columns, d.
        dimension: u64,
    },
    /// Some inputs were zero in every vector. The weight's columns for these inputs are set to
    /// zero.
    DeadColumns {
        /// The number of dead columns in all groups.
        count: u64,
        /// The number of all columns in all groups.
        of: u64,
    },
    /// The Cholesky factorization failed with the requested dampening.
    MoreDampening {
        /// The requested dampening.
        asked: f64,
        /// The dampening with which it succeeded.
        used: f64,
    },
    /// The sparsity differs from the requested one by more than 0.1 %. The reason is small blocks,
    /// or many zeros in the weight.
    SparsityOff {
        /// The requested share of zeros.
        asked: f64,
        /// The share of masked elements.
        reached: f64,
    },
    /// m does not divide the number of columns, and the last columns stay dense.
    IncompleteGroup {
        /// The number of dense columns.
        columns: u64,
        /// m of n:m.
        m: u64,
    },
    /// There were few vectors for the effective rank of the inputs, so the joint solver used more
    /// dampening and changed the weights less.
    Shrunk {
        /// Vectors seen.
        vectors: u64,
        /// Columns, d.
        dimension: u64,
        /// The requested dampening.
        asked: f64,
        /// The dampening used.
        used: f64,
    },
    /// The joint solution had a larger error than the sequential one, which was used instead.
    JointNoBetter {
        /// The loss of the joint solution as a multiple of the loss of the sequential one.
        ratio: f64,
    },
    /// The joint solution had a larger error on held-out vectors than the sequential one, which was
    /// used instead.
    HeldOutNoBetter {
        /// The held-out error of the joint solution as a multiple of that of the sequential one.
        ratio: f64,
    },
    /// The joint solver does not support palettes of this form; the palettizer made them.
    NotJoint,
    /// Indices were to be polished by the metric of the layer's outputs, which is not there.
    NoMetric,
}

impl fmt::Display for Note {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Note::FewVectors { vectors, dimension } => {
                write!(f, "calibrated on {vectors} vectors, fewer than its {dimension} inputs")
            }
            Note::DeadColumns { count, of } => {
                write!(f, "{count} of {of} inputs were always zero in calibration; their weights are zero now")
            }
            Note::MoreDampening { asked, used } => {
                write!(f, "the Hessian needed a dampening of {used:.0e}, not {asked:.0e}")
            }
            Note::SparsityOff { asked, reached } => {
                write!(f, "{:.2} % of the weight is pruned, {:.2} % was asked for", reached * 100.0, asked * 100.0)
            }
            Note::IncompleteGroup { columns, m } => {
                write!(f, "the last {columns} columns are no group of {m} and stay dense")
            }
            Note::Shrunk { vectors, dimension, asked, used } => {
                write!(f, "{vectors} vectors say little of {dimension} inputs: a dampening of {used:.3}, not {asked}")
            }
            Note::JointNoBetter { ratio } => {
                write!(f, "the joint solution's error was {ratio:.2} times the sequential one's, which was taken")
            }
            Note::HeldOutNoBetter { ratio } => {
                write!(
                    f,
                    "on held-out samples the joint solution's error was {ratio:.2} times the sequential one's, which was taken"
                )
            }
            Note::NoMetric => f.write_str(
                "not polished by the effect of its errors on the network's output: none was measured, or its outputs are in groups",
            ),
            Note::NotJoint => {
                f.write_str("palettes along input channels or with scales are made after pruning, not jointly with it")
            }
        }
    }
}
