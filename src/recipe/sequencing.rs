//! The order of calibration and compression within a stage.

/// Which version of a stage's layers the Hessians of its later layers are gathered behind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sequencing {
    /// All Hessians of a stage are gathered on its dense layers, behind compressed stages.
    Stage,
    /// The Hessian of each input is gathered behind the compressed layers before it.
    Sublayer {
        /// Whether layers are fitted to the outputs of the dense network, which compensates for the
        /// errors of the layers before them.
        dense_target: bool,
    },
}

impl Sequencing {
    /// Whether layers are fitted to the outputs of the dense network, which then runs beside the
    /// compressed one.
    #[must_use]
    pub fn has_dense_target(self) -> bool {
        match self {
            Sequencing::Stage => false,
            Sequencing::Sublayer { dense_target } => dense_target,
        }
    }
}
