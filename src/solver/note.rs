//! What a user should know of a weight's compression, as data.

use std::fmt;

/// Something about one weight's pruning that was not as asked, or that makes its result doubtful.
/// The caller knows the layer's name and puts it in front.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Note {
    /// The Hessian was built from fewer vectors than it has columns: it is singular but for the
    /// dampening, and fits the calibration inputs rather than the layer.
    FewVectors {
        /// Vectors seen.
        vectors: u64,
        /// Columns, d.
        dimension: u64,
    },
    /// Inputs that were zero in every vector; the weight's columns for them are zero now.
    DeadColumns {
        /// How many, over all groups.
        count: u64,
        /// Of how many.
        of: u64,
    },
    /// The Cholesky factorization failed with the dampening asked for.
    MoreDampening {
        /// Asked for.
        asked: f64,
        /// What it worked with.
        used: f64,
    },
    /// The sparsity reached is more than 0.1 % off the one asked for: blocks so small that one
    /// element counts, or many zeros in the weight.
    SparsityOff {
        /// Share of zeros asked for.
        asked: f64,
        /// Share of masked elements.
        reached: f64,
    },
    /// m does not divide the columns; the last ones were left dense.
    IncompleteGroup {
        /// How many columns were left.
        columns: u64,
        /// m of n:m.
        m: u64,
    },
    /// So few vectors for the spread of the inputs that the joint solver stays nearer to the
    /// weights as they were.
    Shrunk {
        /// Vectors seen.
        vectors: u64,
        /// Columns, d.
        dimension: u64,
        /// The dampening asked for.
        asked: f64,
        /// The dampening used.
        used: f64,
    },
    /// The joint solution had a larger error than the sequential one, which was taken.
    JointNoBetter {
        /// Its loss as a multiple of the sequential one's.
        ratio: f64,
    },
    /// On vectors that the Hessian has not seen, the joint solution had a larger error than the
    /// sequential one, which was taken.
    HeldOutNoBetter {
        /// Its error there as a multiple of the sequential one's.
        ratio: f64,
    },
    /// Palettes of a form that the joint solver leaves to the palettizer.
    NotJoint,
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
            Note::NotJoint => {
                f.write_str("palettes along input channels or with scales are made after pruning, not jointly with it")
            }
        }
    }
}
