//! The folder of a UNet alone, which people have without the rest of its pipeline.

use std::path::{Path, PathBuf};

use sdxl_model::checkpoint::{ConfigFile, SourceFile, Weights};
use sdxl_model::ldm::MARKERS;
use sdxl_model::unet::{UnetChain, UnetConfig};
use serde_json::{Map, Value};
use squeeze_base::error::Result;
use squeeze_base::input::{self, Limit};
use squeeze_base::shorten::shorten;

/// A UNet in diffusers layout: `config.json` and weights.
#[derive(Debug)]
pub struct UnetFolder {
    /// The folder.
    pub path: PathBuf,
    /// The chain of stages.
    pub chain: UnetChain,
    /// `config.json`, every entry.
    pub config: Map<String, Value>,
    /// The length and hash of `config.json`, under its name in a pipeline.
    pub config_file: SourceFile,
    /// The weights, which are those of the chain.
    pub weights: Weights,
}

impl UnetFolder {
    /// What stands before the names of a UNet's files in a pipeline.
    pub const IN_PIPELINE: &str = "unet/";

    /// Whether `path` is such a folder, and not a pipeline's or that of another part. A config that
    /// cannot be read may be a UNet's: opening it says what is wrong.
    #[must_use]
    pub fn is_at(path: &Path) -> bool {
        let config = path.join("config.json");
        if !config.is_file() || path.join("model_index.json").symlink_metadata().is_ok() {
            return false;
        }
        let Ok(entries) = ConfigFile::read(&config).map(ConfigFile::into_entries) else { return true };
        match entries.get("_class_name").and_then(Value::as_str) {
            Some(class) => class.starts_with("UNet"),
            // The configs of transformers, as those of text encoders.
            None => !entries.contains_key("architectures") && !entries.contains_key("model_type"),
        }
    }

    /// Opens the folder.
    ///
    /// # Errors
    /// If the config or the weights cannot be read, the architecture is not implemented, or the
    /// two disagree.
    pub fn open(path: &Path) -> Result<Self> {
        let at = path.join("config.json");
        // Read once, so that the recorded hash is that of the config in use.
        let content = input::read(&at, Limit::MODEL_CONFIG)?;
        let config = ConfigFile::from_bytes(&at, &content)?.into_entries();
        let chain = UnetChain::new(UnetConfig::parse(ConfigFile::from_entries(&at, config.clone()))?);
        let weights = known_weights(path)?;
        weights.check(&chain.tensors()?, |_| false)?;
        let config_file = SourceFile::of_bytes(&content, format!("{}config.json", Self::IN_PIPELINE));
        Ok(UnetFolder { path: path.to_owned(), chain, config, config_file, weights })
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
