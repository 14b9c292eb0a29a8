//! The compression of one layer: pruning, palettization, or both.

use std::collections::BTreeMap;

use squeeze_codebook::{Effort, PaletteOptions, PruneMethod, PruneOptions};
use squeeze_solver::{GPTQ_DAMPENING, JointOptions};

/// The recipes of all layers that are compressed, by checkpoint name. Every other layer stays in
/// fp16.
pub type LayerRecipes = BTreeMap<String, LayerRecipe>;

/// How one layer is compressed: pruned, palettized, or both.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerRecipe {
    /// Sparsity and dampening; `None` keeps every weight.
    pub prune: Option<PruneOptions>,
    /// How the pruned weights are chosen.
    pub method: PruneMethod,
    /// Bits and grouping of the palettes; `None` keeps the values in fp16.
    pub palettize: Option<PaletteOptions>,
    /// Effort of the joint solver, which finds mask, weights and palettes together
    /// ([`joint`](squeeze_solver::joint())); `None` prunes first and palettizes the result.
    pub joint: Option<Effort>,
}

impl LayerRecipe {
    /// The options of the joint solver, if the layer uses it.
    #[must_use]
    pub fn joint_options(&self) -> Option<JointOptions> {
        self.joint.map(|effort| JointOptions { prune: self.prune, palettize: self.palettize, effort, trial: false })
    }

    /// Whether the layer stays fp16.
    #[must_use]
    pub fn is_dense(&self) -> bool {
        self.prune.is_none() && self.palettize.is_none()
    }

    /// The pruning options if layers of one shape can be pruned in one batch, which only SparseGPT
    /// can do.
    #[must_use]
    pub fn batch_options(&self) -> Option<&PruneOptions> {
        match self.method {
            PruneMethod::SparseGpt => self.prune.as_ref().filter(|_| self.joint.is_none()),
            PruneMethod::Magnitude => None,
        }
    }

    /// The palette options if the layer is rounded to fixed values with error feedback
    /// ([`gptq`](squeeze_solver::gptq())).
    #[must_use]
    pub fn gptq_options(&self) -> Option<&PaletteOptions> {
        self.palettize.as_ref().filter(|options| options.quantizer.is_some_and(|quantizer| quantizer.feedback))
    }

    /// The dampening of the factor that SparseGPT or GPTQ needs, if the layer uses either.
    #[must_use]
    pub fn sequential_dampening(&self) -> Option<f64> {
        let of_gptq = self.gptq_options().filter(|_| self.joint.is_none()).map(|_| GPTQ_DAMPENING);
        self.batch_options().map(|options| options.dampening).or(of_gptq)
    }

    /// The number of samples on which the metric of the layer's outputs is measured; 0 if indices
    /// are not polished by it.
    #[must_use]
    pub fn output_probes(&self) -> usize {
        self.palettize.and(self.joint).map_or(0, |effort| effort.output_probes)
    }

    /// Whether compression needs the Hessian of the layer's input.
    #[must_use]
    pub fn needs_hessian(&self) -> bool {
        self.joint.is_some() || self.sequential_dampening().is_some()
    }
}
