//! The compression settings of one weight. Defaults are those of coremltools; names of its settings
//! are in brackets where they differ.

use super::{BitWidth, Grouping, Quantizer, Sparsity};

/// The settings for pruning a weight: coremltools' `ModuleSparseGPTConfig` without its quantizer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PruneOptions {
    /// The share and pattern of zeros (`target_sparsity` or `n_m_ratio`).
    pub sparsity: Sparsity,
    /// The share of the Hessian's mean diagonal that is added to its diagonal
    /// (`hessian_dampening`). At least 0.
    pub dampening: f64,
    /// The number of columns whose mask is chosen together, at least 1 (`processing_group_size`).
    /// For n:m sparsity the next smaller multiple of m is used.
    pub block: usize,
    /// The number of neighbouring output channels that are pruned together, at least 1: those whose
    /// weights share an index ([`PaletteOptions::vector_length`]).
    pub rows_together: usize,
}

impl Default for PruneOptions {
    /// Half of the elements, a dampening of 0.01, blocks of 128 columns.
    fn default() -> Self {
        PruneOptions { sparsity: Sparsity::Unstructured(0.5), dampening: 0.01, block: 128, rows_together: 1 }
    }
}

/// The settings for palettizing a weight: coremltools' `ModulePostTrainingPalettizerConfig`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PaletteOptions {
    /// The width of an index (`n_bits`).
    pub bits: BitWidth,
    /// The groups of weights that share a palette (`granularity` and `group_size`).
    pub grouping: Grouping,
    /// The dimension whose channels are grouped (`channel_axis`): 0 for output channels, 1 for
    /// input channels. Without groups it has no meaning.
    pub axis: usize,
    /// Whether each output channel is first divided by its largest magnitude, and the divisor
    /// stored (`enable_per_channel_scale`).
    pub per_channel_scale: bool,
    /// The number of neighbouring output channels whose weights share an index, at least 1
    /// (`cluster_dim`). A palette's entry is then a vector of as many values.
    pub vector_length: usize,
    /// Fixed values with scales in the place of fitted palettes, if they are asked for. Then there
    /// are no groups, scales of whole channels or vectors.
    pub quantizer: Option<Quantizer>,
}

impl Default for PaletteOptions {
    /// 4 bits, one fitted palette for the whole weight, no scales, no vectors.
    fn default() -> Self {
        PaletteOptions {
            bits: BitWidth::Four,
            grouping: Grouping::PerTensor,
            axis: 0,
            per_channel_scale: false,
            vector_length: 1,
            quantizer: None,
        }
    }
}
