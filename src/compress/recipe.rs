//! From a run's config to what is done to each layer, and what that will take.

use super::{Treatment, Treatments};
use crate::checkpoint::Blueprint;
use crate::config::{LayerInfo, Pace, Resolution, RunConfig, SolverKind, Target};
use crate::error::Result;
use crate::model::Layer;
use crate::model::unet::UnetChain;

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
        let method = config.prune.as_ref().map(|section| section.algorithm).unwrap_or_default();
        let mut treatments = Treatments::new();
        for layer in &resolution.layers {
            let treatment = Treatment {
                joint: (config.solver == SolverKind::Joint).then_some(config.effort),
                prune: layer.prune.settings().copied(),
                method,
                palettize: layer.palettize.settings().copied(),
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
            module_type: layer.kind(),
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
