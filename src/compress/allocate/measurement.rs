//! The run on which an allocation measures errors, and the bounds within which it chooses.

use std::path::Path;

use squeeze_base::progress::Progress;
use squeeze_codebook::BitWidth;

use super::super::gather::Gatherer;
use super::super::job::Job;

/// A run of the dense network that measures errors.
pub(in super::super) struct Measurement<'a> {
    /// Planned for the recipes of [`measuring`](super::measuring).
    pub job: Job<'a>,
    /// Hessians of text and time from captions.
    pub captions: Gatherer,
    /// The folder for carries.
    pub folder: &'a Path,
    pub progress: &'a dyn Progress,
}

/// Bounds on the settings of every layer.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    pub min_bits: BitWidth,
    pub max_sparsity: f64,
    /// Whether palettes of vectors are allowed.
    pub vectors: bool,
}
