//! The files that change or complete a model.

use std::path::PathBuf;

use sdxl_squeeze::pipeline::{LoraFile, ModelFiles};

use super::paths::Paths;

/// The flags beside `--model`.
#[derive(Debug, clap::Args)]
pub(super) struct BesideModel {
    /// Another pipeline, for the configs, tokenizers and parts that a single-file checkpoint lacks
    #[arg(long, value_name = "DIR|FILE")]
    base: Option<PathBuf>,
    /// A VAE in the place of the pipeline's own: a folder in diffusers layout or a file
    #[arg(long, value_name = "DIR|FILE")]
    vae: Option<PathBuf>,
    /// A LoRA to merge into UNet and text encoders, with the factor of its changes; repeatable
    #[arg(long = "lora", value_name = "FILE[:SCALE]")]
    loras: Vec<LoraFile>,
    /// Tensors of the LoRAs to leave out: an expression for whole names
    #[arg(long, value_name = "REGEX", requires = "loras")]
    lora_ignore: Option<String>,
}

impl BesideModel {
    /// The files of the pipeline `model`.
    pub(super) fn files(&self, model: PathBuf) -> ModelFiles {
        let BesideModel { base, vae, loras, lora_ignore } = self;
        let (base, vae) = (base.clone(), vae.clone());
        ModelFiles { model, base, vae, loras: loras.clone(), lora_ignore: lora_ignore.clone() }
    }

    /// Adds the files, which are read.
    pub(super) fn read_in(&self, paths: Paths) -> Paths {
        let paths = paths.model("--base", self.base.as_deref()).model("--vae", self.vae.as_deref());
        paths.read_by("--lora", self.loras.iter().map(|lora| lora.path.as_path()))
    }

    /// The first of the flags that is given.
    pub(super) fn first_given(&self) -> Option<&'static str> {
        let given = [("--base", self.base.is_some()), ("--vae", self.vae.is_some()), ("--lora", !self.loras.is_empty())];
        given.into_iter().find_map(|(flag, given)| given.then_some(flag))
    }
}
