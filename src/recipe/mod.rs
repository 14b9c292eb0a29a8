//! A run's config, resolved on the layers of one UNet: how each layer is compressed, and in what
//! order.
//!
//! Planning and compression both start from a [`Recipe`].

mod layer;
mod options;
mod sequencing;

pub use layer::{LayerRecipe, LayerRecipes, PruneMethod};
pub use options::{Devices, RunOptions};
pub use sequencing::Sequencing;

use crate::checkpoint::Blueprint;
use crate::config::{
    self, LayerInfo, ModuleType, Pace, PaletteSettings, PruneAlgorithm, PruneSettings, Resolution, RunConfig, SolverKind, Target,
};
use crate::error::Result;
use crate::model::Layer;
use crate::model::unet::UnetChain;
use crate::solver::palette::{Granularity, OnMisfit, PaletteOptions};
use crate::solver::{PruneOptions, Sparsity};

/// A config, resolved on the layers of one UNet.
#[derive(Debug, Clone)]
pub struct Recipe {
    /// How each layer is compressed.
    pub layers: LayerRecipes,
    /// The order of calibration and compression within a stage.
    pub sequencing: Sequencing,
    /// The rules, the layers that each rule matched, and findings about them.
    pub resolution: Resolution,
}

impl Recipe {
    /// Whether any layer needs calibration samples.
    pub fn needs_samples(&self) -> bool {
        self.layers.values().any(LayerRecipe::needs_hessian)
    }

    /// Resolves `config` on the layers of `chain`.
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config) with every mistake: a pattern that matches nothing,
    /// a group that does not divide.
    pub fn new(config: &RunConfig, chain: &UnetChain) -> Result<Self> {
        let infos = layers_of(chain)?;
        let resolution = config.resolve(&infos).checked()?;
        let method = match config.prune.as_ref().map(|section| section.algorithm) {
            Some(PruneAlgorithm::Magnitude) => PruneMethod::Magnitude,
            Some(PruneAlgorithm::SparseGpt) | None => PruneMethod::SparseGpt,
        };
        let mut layers = LayerRecipes::new();
        for layer in &resolution.layers {
            let recipe = LayerRecipe {
                joint: (config.solver == SolverKind::Joint).then_some(config.effort),
                prune: layer.prune.settings().map(prune_options),
                method,
                palettize: layer.palettize.settings().map(palette_options),
            };
            if recipe.prune.is_some() || recipe.palettize.is_some() {
                layers.insert(layer.name.clone(), recipe);
            }
        }
        let sequencing = match config.pace {
            Pace::Stage => Sequencing::Stage,
            Pace::Sublayer => Sequencing::Sublayer { dense_target: config.target == Target::Dense },
        };
        Ok(Recipe { layers, sequencing, resolution })
    }
}

/// Every Conv2d and Linear of a UNet, in execution order.
///
/// # Errors
/// If libtorch cannot make a tensor at all.
pub fn layers_of(chain: &UnetChain) -> Result<Vec<LayerInfo>> {
    let blueprint = Blueprint::default();
    let mut infos = Vec::new();
    let mut add = |stage: Option<String>, layers: &[Layer]| {
        infos.extend(layers.iter().map(|layer| LayerInfo {
            name: layer.name().to_owned(),
            stage: stage.clone(),
            module_type: ModuleType::from(layer.kind()),
            shape: layer.weight().size(),
        }));
    };
    add(None, chain.load_head(&blueprint)?.layers());
    for spec in chain.stages() {
        add(Some(spec.name().to_string()), spec.load(&blueprint)?.layers());
    }
    add(None, chain.load_tail(&blueprint)?.layers());
    Ok(infos)
}

fn prune_options(settings: &PruneSettings) -> PruneOptions {
    let PruneSettings { sparsity, hessian_dampening, processing_group_size } = settings;
    let sparsity = match sparsity {
        config::Sparsity::Unstructured(share) => Sparsity::Unstructured(*share),
        config::Sparsity::NOfM(ratio) => Sparsity::NM { n: ratio.n, m: ratio.m },
    };
    PruneOptions { sparsity, dampening: *hessian_dampening, block: *processing_group_size }
}

fn palette_options(settings: &PaletteSettings) -> PaletteOptions {
    let PaletteSettings { n_bits, granularity, channel_axis, enable_per_channel_scale } = settings;
    let granularity = match granularity {
        config::Granularity::PerTensor => Granularity::PerTensor,
        config::Granularity::PerGroupedChannel { group_size } => {
            Granularity::PerGroupedChannel { group_size: *group_size, axis: *channel_axis }
        }
    };
    // Groups that do not divide have been settled by the resolution.
    let on_misfit = OnMisfit::Error;
    PaletteOptions { bits: *n_bits, granularity, per_channel_scale: *enable_per_channel_scale, on_misfit }
}
