//! The settings of the joint solver.

use squeeze_codebook::{Effort, Grouping, PaletteOptions, PruneOptions};

use super::factors::Order;

/// The settings of [`joint`](super::joint()).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct JointOptions {
    /// How the weight is pruned; its `dampening` is that of the factors. `None` keeps all weights.
    pub prune: Option<PruneOptions>,
    /// How the weight is palettized; `None` makes no palettes.
    pub palettize: Option<PaletteOptions>,
    /// How much work is done.
    pub effort: Effort,
    /// Whether only the loss is of interest, to compare settings with each other: palettes of
    /// vectors are searched for from one start, and not compared with the sequential solution.
    pub trial: bool,
}

impl JointOptions {
    /// Settings with the default effort.
    #[must_use]
    pub fn new(prune: Option<PruneOptions>, palettize: Option<PaletteOptions>) -> Self {
        JointOptions { prune, palettize, effort: Effort::default(), trial: false }
    }

    /// The order of columns in which these settings are solved best.
    #[must_use]
    pub fn order(&self) -> Order {
        if self.prune.is_some() { Order::Natural } else { Order::Activation }
    }

    /// The number of rows with one mask.
    pub(super) fn rows_together(&self) -> usize {
        self.prune.map_or(1, |prune| prune.rows_together)
    }

    /// The dampening that the factors must have.
    #[must_use]
    pub fn dampening(&self) -> f64 {
        self.prune.map_or(DENSE_DAMPENING, |prune| prune.dampening)
    }
}

/// The dampening where nothing is pruned, as a share of the Hessian's mean diagonal. All of such a
/// weight is free to overfit the calibration inputs. On the bundled model 0.03 to 0.15 give the
/// least error on other inputs.
const DENSE_DAMPENING: f64 = 0.03;

/// Whether [`joint`](super::joint()) finds such palettes jointly with mask and weights. It makes
/// others, along input channels or with scales, after pruning.
#[must_use]
pub fn finds_jointly(options: &PaletteOptions) -> bool {
    !options.per_channel_scale && along_outputs(options)
}

/// Whether each palette belongs to whole output channels.
pub(super) fn along_outputs(options: &PaletteOptions) -> bool {
    match options.grouping {
        Grouping::PerTensor => true,
        Grouping::PerGroupedChannel { .. } => options.axis == 0,
    }
}
