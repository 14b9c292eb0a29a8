//! From a run's config to what is done to each layer, and what that will take.

use super::{PruneMethod, Treatment, Treatments};
use crate::checkpoint::Blueprint;
use crate::config::{
    self, LayerInfo, ModuleType, Pace, PaletteSettings, PruneAlgorithm, PruneSettings, Resolution, RunConfig, SolverKind, Target,
};
use crate::error::Result;
use crate::model::Layer;
use crate::model::unet::UnetChain;
use crate::solver::palette::{Granularity, OnMisfit, PaletteOptions};
use crate::solver::{PruneOptions, Sparsity};

/// When the layers of a stage learn of each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sequencing {
    /// All Hessians of a stage come from its dense layers, behind compressed stages.
    Stage,
    /// Each input's Hessian comes from the layers before it as they will be stored.
    Sublayer {
        /// Whether layers aim at the dense network's outputs, so that they make up for the errors before them.
        dense_target: bool,
    },
}

impl Sequencing {
    /// Whether layers aim at the dense network's outputs, which runs beside the compressed one then.
    pub fn aims(self) -> bool {
        self == Sequencing::Sublayer { dense_target: true }
    }
}

/// A config, resolved on the layers of one UNet.
#[derive(Debug, Clone)]
pub struct Recipe {
    /// What is done to each layer.
    pub treatments: Treatments,
    /// When layers learn of each other.
    pub sequencing: Sequencing,
    /// The rules, what each of them matched, and what was found wrong or worth saying.
    pub resolution: Resolution,
}

impl Recipe {
    /// Resolves `config` on the layers of `chain`.
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config) with every mistake: a pattern that matches nothing, a group that does not divide.
    pub fn new(config: &RunConfig, chain: &UnetChain) -> Result<Self> {
        let infos = layers_of(chain)?;
        let resolution = config.resolve(&infos).checked()?;
        let method = match config.prune.as_ref().map(|section| section.algorithm) {
            Some(PruneAlgorithm::Magnitude) => PruneMethod::Magnitude,
            Some(PruneAlgorithm::SparseGpt) | None => PruneMethod::SparseGpt,
        };
        let mut treatments = Treatments::new();
        for layer in &resolution.layers {
            let treatment = Treatment {
                joint: (config.solver == SolverKind::Joint).then_some(config.effort),
                prune: layer.prune.settings().map(prune_options),
                method,
                palettize: layer.palettize.settings().map(palette_options),
            };
            if treatment.prune.is_some() || treatment.palettize.is_some() {
                treatments.insert(layer.name.clone(), treatment);
            }
        }
        let sequencing = match config.sequencing {
            Pace::Stage => Sequencing::Stage,
            Pace::Sublayer => Sequencing::Sublayer { dense_target: config.target == Target::Dense },
        };
        Ok(Recipe { treatments, sequencing, resolution })
    }
}

/// Every Conv2d and Linear of a UNet, in execution order.
///
/// # Errors
/// If libtorch cannot make a tensor at all.
pub fn layers_of(chain: &UnetChain) -> Result<Vec<LayerInfo>> {
    let blueprint = Blueprint::default();
    let mut found = Vec::new();
    let mut add = |stage: Option<String>, layers: &[Layer]| {
        found.extend(layers.iter().map(|layer| LayerInfo {
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
    Ok(found)
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
