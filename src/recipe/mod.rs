//! A run's config, resolved on the layers of one UNet: how each layer is compressed, and in what
//! order.
//!
//! Planning and compression both start from a [`Recipe`].

mod layer;
mod options;
mod sequencing;
mod size;

pub use layer::{LayerRecipe, LayerRecipes};
pub use options::{Devices, RunOptions};
use sdxl_model::Layer;
use sdxl_model::checkpoint::Blueprint;
use sdxl_model::unet::UnetChain;
pub use sequencing::Sequencing;
pub use size::{kept, stored_bytes};
use squeeze_base::error::{Error, Result};
use squeeze_codebook::{PruneMethod, PruneOptions};

use crate::config::{Finding, LayerInfo, Resolution, RunConfig, Section, SequencingWord, SolverKind, Target};

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

    /// What of a run by `config` needs more of a pipeline than its UNet, in words; `None` if the
    /// UNet alone does.
    #[must_use]
    pub fn needs_pipeline(&self, config: &RunConfig) -> Option<&'static str> {
        if config.budget.is_some() {
            Some("a budget")
        } else if self.needs_samples() {
            Some("calibration")
        } else if config.tune.is_some() {
            Some("tuning")
        } else if config.text_encoders.is_some() || config.vae.is_some() {
            Some("compression of text encoders and VAE")
        } else {
            None
        }
    }

    /// Refuses a config of the user's that leaves every layer alone. A budget may end with such a
    /// recipe: the settings of least error are fp16.
    ///
    /// # Errors
    /// [`Error::Config`].
    pub fn check_not_empty(&self) -> Result<()> {
        if self.layers.is_empty() { Err(Error::Config { mistakes: vec![Finding::Nothing.mistake()] }) } else { Ok(()) }
    }

    /// Resolves `config` on the layers of `chain`.
    ///
    /// # Errors
    /// [`Error::Config`] with every mistake: a pattern that matches nothing, a group that does not
    /// divide.
    pub fn new(config: &RunConfig, chain: &UnetChain) -> Result<Self> {
        let infos = layers_of(chain)?;
        let mut resolution = config.resolve(&infos).checked()?;
        let method = config.prune.as_ref().map(|section| section.algorithm).unwrap_or_default();
        let mut layers = LayerRecipes::new();
        for layer in &resolution.layers {
            let palettize = layer.palettize.settings().copied();
            let rows_together = palettize.map_or(1, |palette| palette.vector_length);
            let recipe = LayerRecipe {
                joint: (config.solver == SolverKind::Joint).then_some(config.effort),
                prune: layer.prune.settings().map(|prune| PruneOptions { rows_together, ..*prune }),
                method,
                palettize,
            };
            if recipe.prune.is_some() || recipe.palettize.is_some() {
                layers.insert(layer.name.clone(), recipe);
            }
        }
        resolution.add(larger_than_fp16(&infos, &layers));
        let sequencing = match config.sequencing {
            SequencingWord::Stage => Sequencing::Stage,
            SequencingWord::Sublayer => Sequencing::Sublayer { dense_target: config.target == Target::Dense },
        };
        Ok(Recipe { layers, sequencing, resolution })
    }
}

/// How each of `layers` is compressed by `section` of `config`, which is about other networks than
/// the UNet, and the resolution that says so.
///
/// # Errors
/// As [`Recipe::new`].
pub fn network_layers(config: &RunConfig, section: Section, layers: &[LayerInfo]) -> Result<(LayerRecipes, Resolution)> {
    let mut resolution = config.resolve_networks(section, layers).checked()?;
    let joint = (config.solver == SolverKind::Joint).then_some(config.effort);
    let recipe = |palettize| LayerRecipe { prune: None, method: PruneMethod::default(), palettize: Some(palettize), joint };
    let settings = resolution.layers.iter().filter_map(|layer| Some((layer.name.clone(), *layer.palettize.settings()?)));
    let recipes = settings.map(|(name, palettize)| (name, recipe(palettize))).collect();
    resolution.add(larger_than_fp16(layers, &recipes));
    Ok((recipes, resolution))
}

/// The layers whose compressed weights are larger than those in fp16.
fn larger_than_fp16(infos: &[LayerInfo], recipes: &LayerRecipes) -> Option<Finding> {
    let (mut layers, mut bytes, mut dense) = (Vec::new(), 0, 0);
    for info in infos {
        let Some(recipe) = recipes.get(&info.name).filter(|recipe| recipe.palettize.is_some()) else { continue };
        let (compressed, fp16) = (stored_bytes(&info.shape, recipe), 2 * info.elements());
        if compressed > fp16 {
            layers.push(info.name.clone());
            bytes += compressed;
            dense += fp16;
        }
    }
    (!layers.is_empty()).then_some(Finding::LargerThanFp16 { layers, bytes, dense })
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
            module_type: layer.kind(),
            shape: layer.weight().size(),
        }));
    };
    add(None, chain.load_input_block(&blueprint)?.layers());
    for spec in chain.stages() {
        add(Some(spec.name().to_string()), spec.load(&blueprint)?.layers());
    }
    add(None, chain.load_output_block(&blueprint)?.layers());
    Ok(infos)
}
