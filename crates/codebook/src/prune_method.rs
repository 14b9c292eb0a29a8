//! Methods of pruning.

use serde::Serialize;

/// A rule for the choice of pruned weights and for the adjustment of the kept ones.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum PruneMethod {
    /// `sparse_gpt`: Frantar and Alistarh, SparseGPT (2023), as coremltools' `LayerwiseCompressor`
    /// runs it. Kept weights are adjusted to compensate for the pruned ones.
    #[default]
    SparseGpt,
    /// `magnitude`: the smallest weights of each layer are pruned and the others stay as they are.
    /// Needs no calibration; the baseline for SparseGPT.
    Magnitude,
}

impl PruneMethod {
    /// All methods.
    pub const ALL: [PruneMethod; 2] = [PruneMethod::SparseGpt, PruneMethod::Magnitude];

    /// The name in a config.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            PruneMethod::SparseGpt => "sparse_gpt",
            PruneMethod::Magnitude => "magnitude",
        }
    }
}
