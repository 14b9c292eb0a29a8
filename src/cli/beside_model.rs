//! The files that change or complete a model.

use std::path::PathBuf;

use sdxl_squeeze::pipeline::{LoraFile, ModelFiles};

use super::paths::Paths;

/// The flags beside `--model`.
#[derive(Debug, Clone, clap::Args)]
pub(super) struct BesideModel {
    /// Another pipeline, for the configs, tokenizers and parts that a single-file checkpoint lacks
    #[arg(long, value_name = "DIR|FILE")]
    base: Option<PathBuf>,
    /// A VAE in the place of the pipeline's own: a folder in diffusers layout, a file or a
    /// container
    #[arg(long, value_name = "DIR|FILE")]
    vae: Option<PathBuf>,
    /// A container with the first text encoder, in the place of the pipeline's own
    #[arg(long, value_name = "FILE")]
    text_encoder: Option<PathBuf>,
    /// A container with the second text encoder, in the place of the pipeline's own
    #[arg(long = "text-encoder-2", value_name = "FILE")]
    text_encoder_2: Option<PathBuf>,
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
        let BesideModel { base, vae, text_encoder, text_encoder_2, loras, lora_ignore } = self.clone();
        ModelFiles { model, base, vae, text_encoder, text_encoder_2, loras, lora_ignore }
    }

    /// Adds the files, which are read.
    pub(super) fn read_in(&self, paths: Paths) -> Paths {
        let paths = paths.model("--base", self.base.as_deref()).model("--vae", self.vae.as_deref());
        let paths = paths.reads("--text-encoder", self.text_encoder.as_deref());
        let paths = paths.reads("--text-encoder-2", self.text_encoder_2.as_deref());
        paths.read_by("--lora", self.loras.iter().map(|lora| lora.path.as_path()))
    }

    /// The first of the flags that is given.
    pub(super) fn first_given(&self) -> Option<&'static str> {
        let given = [
            ("--base", self.base.is_some()),
            ("--vae", self.vae.is_some()),
            ("--text-encoder", self.text_encoder.is_some()),
            ("--text-encoder-2", self.text_encoder_2.is_some()),
            ("--lora", !self.loras.is_empty()),
        ];
        given.into_iter().find_map(|(flag, given)| given.then_some(flag))
    }
}
