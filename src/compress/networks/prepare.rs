//! Checks before a text encoder or a VAE is compressed.

use std::path::{Path, PathBuf};

use sdxl_pipeline::PipelineFolder;
use squeeze_base::error::Result;
use squeeze_container::Network;
use squeeze_numerics::device::Placement;
use tch::Kind;

use super::amount;
use super::dense::{Dense, Halves};
use crate::compress::prepare::{check_place, settled};
use crate::config::{LayerInfo, RunConfig, Section, read_prompts};
use crate::recipe::{LayerRecipe, LayerRecipes, RunOptions, network_layers};

/// A text encoder or a VAE whose compression has passed all checks that are possible before it
/// computes: its section of the config fits the model, and its texts can be read.
#[derive(Debug)]
pub struct PreparedNetwork<'a> {
    pub(super) folder: &'a PipelineFolder,
    pub(super) config: RunConfig,
    pub(super) options: RunOptions,
    pub(super) dense: Dense<'a>,
    pub(super) path: PathBuf,
    /// By checkpoint name, without the network's.
    pub(super) recipes: LayerRecipes,
    pub(super) findings: Vec<String>,
    /// Texts or pictures to calibrate with, as many as there are.
    pub(super) nsamples: usize,
}

impl<'a> PreparedNetwork<'a> {
    /// Prepares every network that has a section in `config`, in the order in which a picture needs
    /// them. The containers will be in `out`: `text_encoder.squeezed.safetensors`, for example.
    ///
    /// # Errors
    /// [`Error::Argument`](squeeze_base::Error::Argument) if `options` or `folder` are not those
    /// that `config` names, or the memory is too little;
    /// [`Error::Config`](squeeze_base::Error::Config) if a section does not fit the model; if
    /// weights or texts cannot be read.
    pub fn all(folder: &'a PipelineFolder, config: &RunConfig, options: &RunOptions, out: &Path) -> Result<Vec<Self>> {
        if config.text_encoders.is_none() && config.vae.is_none() {
            return Ok(Vec::new());
        }
        check_place(folder.into(), config, options)?;
        let config = settled(folder, config);
        let mut prepared = Vec::new();
        if let Some(section) = &config.text_encoders {
            let encoders: Vec<Dense<'_>> = Dense::text_encoders(folder).collect();
            prepared.extend(of_section(folder, &config, options, (Section::TextEncoders, section.nsamples), &encoders, out)?);
        }
        if let Some(section) = &config.vae {
            let halves = if section.encoder { Halves::Both } else { Halves::Decoder };
            let vae = [Dense::Vae(folder, halves)];
            prepared.extend(of_section(folder, &config, options, (Section::Vae, section.network.nsamples), &vae, out)?);
        }
        if prepared.iter().any(PreparedNetwork::is_calibrated) {
            config.calibration.captions.as_deref().map(read_prompts).transpose()?;
            for network in &mut prepared {
                network.nsamples = amount::count(&config, network.network(), network.nsamples)?;
            }
        }
        for network in &prepared {
            network.plan()?.check_memory(options.memory_budget()?)?;
        }
        Ok(prepared)
    }

    /// The network.
    #[must_use]
    pub fn network(&self) -> Network {
        self.dense.network()
    }

    /// The path of its container.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether a layer needs calibration.
    #[must_use]
    pub fn is_calibrated(&self) -> bool {
        self.recipes.values().any(LayerRecipe::needs_hessian)
    }

    /// Where it runs: a VAE in fp32, whatever the dtype of the run.
    pub(super) fn placement(&self) -> Placement {
        let placement = self.options.placement();
        match self.dense {
            Dense::Text(..) => placement,
            Dense::Vae(..) => Placement { kind: Kind::Float, ..placement },
        }
    }
}

/// Prepares the networks of one section. Its rules are resolved on the layers of all of them, so
/// that a rule may be about one.
fn of_section<'a>(
    folder: &'a PipelineFolder,
    config: &RunConfig,
    options: &RunOptions,
    (section, nsamples): (Section, usize),
    networks: &[Dense<'a>],
    out: &Path,
) -> Result<Vec<PreparedNetwork<'a>>> {
    let infos: Vec<Vec<LayerInfo>> = networks.iter().map(|dense| dense.infos()).collect::<Result<_>>()?;
    let all: Vec<LayerInfo> = infos.iter().flatten().cloned().collect();
    let (recipes, resolution) = network_layers(config, section, &all)?;
    let findings: Vec<String> = resolution.findings.iter().map(ToString::to_string).collect();
    let mut prepared = Vec::new();
    for (dense, infos) in networks.iter().zip(infos) {
        let prefix = dense.ruled("");
        let of_network = |info: &LayerInfo| {
            let recipe = recipes.get(&info.name)?;
            let name = info.name.strip_prefix(prefix.as_str()).unwrap_or(&info.name).to_owned();
            Some((name.clone(), dense.recipe(&name, recipe)))
        };
        prepared.push(PreparedNetwork {
            folder,
            config: config.clone(),
            options: options.clone(),
            dense: *dense,
            path: out.join(format!("{}.squeezed.safetensors", dense.network())),
            recipes: infos.iter().filter_map(of_network).collect(),
            // The findings are about all networks of the section.
            findings: if prepared.is_empty() { findings.clone() } else { Vec::new() },
            nsamples,
        });
    }
    Ok(prepared)
}

impl Dense<'_> {
    /// The recipe of the layer `name`. The tokens' embeddings are rows that are looked up: there is
    /// no product whose error could be fitted, and their palettes are those nearest to the rows.
    fn recipe(self, name: &str, recipe: &LayerRecipe) -> LayerRecipe {
        match self {
            Dense::Text(..) if name == super::dense::TOKEN_EMBEDDING => LayerRecipe { joint: None, ..recipe.clone() },
            Dense::Text(..) | Dense::Vae(..) => recipe.clone(),
        }
    }
}
