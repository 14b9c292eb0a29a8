//! The folder of a UNet alone, which people have without the rest of its pipeline.

use std::path::Path;

use sdxl_model::checkpoint::{ConfigFile, Weights};
use sdxl_model::ldm::MARKERS;
use sdxl_model::unet::{UnetChain, UnetConfig};
use serde_json::{Map, Value};
use squeeze_base::error::Result;
use squeeze_base::shorten::shorten;

/// A UNet in diffusers layout: `config.json` and weights.
#[derive(Debug)]
pub struct UnetFolder {
    /// The chain of stages.
    pub chain: UnetChain,
    /// `config.json`, every entry.
    pub config: Map<String, Value>,
    /// The weights, which are those of the chain.
    pub weights: Weights,
}

impl UnetFolder {
    /// Whether `path` is such a folder, and not a pipeline's.
    #[must_use]
    pub fn is_at(path: &Path) -> bool {
        path.join("config.json").is_file() && path.join("model_index.json").symlink_metadata().is_err()
    }

    /// Opens the folder.
    ///
    /// # Errors
    /// If the config or the weights cannot be read, the architecture is not implemented, or the
    /// two disagree.
    pub fn open(path: &Path) -> Result<Self> {
        let config = ConfigFile::read(&path.join("config.json"))?.into_entries();
        let chain = UnetChain::new(UnetConfig::parse(ConfigFile::from_entries(&path.join("config.json"), config.clone()))?);
        let weights = known_weights(path)?;
        weights.check(&chain.tensors()?, |_| false)?;
        Ok(UnetFolder { chain, config, weights })
    }
}

/// The weights of the UNet in `folder`. Marks of single-file checkpoints and moving averages, which
/// some converters copy into it, are not read, as in diffusers, and the log names them.
pub(crate) fn known_weights(folder: &Path) -> Result<Weights> {
    let weights = Weights::open(folder, "diffusion_pytorch_model", str::to_owned)?;
    let (weights, surplus) = weights.without(|name| MARKERS.contains(&name) || name.starts_with("model_ema."));
    if !surplus.is_empty() {
        const SHOWN: usize = 4;
        let names = surplus.iter().take(SHOWN).map(|name| shorten(name)).collect::<Vec<_>>().join(", ");
        let more = if surplus.len() > SHOWN { ", …" } else { "" };
        tracing::warn!(
            "{}: {} tensors are not read ({names}{more}): they are no part of the UNet, and the sampler's config says what it predicts",
            folder.display(),
            surplus.len(),
        );
    }
    Ok(weights)
}
