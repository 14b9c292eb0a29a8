//! The model that a config names, opened: a pipeline, or a UNet alone.

use sdxl_squeeze::Result;
use sdxl_squeeze::config::RunConfig;
use sdxl_squeeze::pipeline::{DenseUnet, ModelFiles, PipelineFolder, UnetFolder};

use super::edits::{model_of, model_path};

/// A model.
pub(super) enum Opened {
    Pipeline(Box<PipelineFolder>),
    Unet(Box<UnetFolder>),
}

impl Opened {
    /// Opens the model of `config`. What changes or completes a pipeline is refused beside a UNet
    /// alone.
    pub(super) fn of(config: &RunConfig) -> Result<Self> {
        let path = model_path(config)?;
        if !UnetFolder::is_at(&path) {
            return Ok(Opened::Pipeline(Box::new(model_of(config)?)));
        }
        let opened = Opened::Unet(Box::new(UnetFolder::open(&path)?));
        let ModelFiles { model: _, base, vae, text_encoder, text_encoder_2, loras, lora_ignore: _ } = config.model.files(path);
        let beside = [
            ("a base", base.is_some()),
            ("another VAE", vae.is_some()),
            ("a compressed text encoder", text_encoder.is_some() || text_encoder_2.is_some()),
            ("the merging of LoRAs", !loras.is_empty()),
        ];
        if let Some((what, _)) = beside.into_iter().find(|(_, is_given)| *is_given) {
            opened.unet().pipeline(what)?;
        }
        Ok(opened)
    }

    /// The UNet.
    pub(super) fn unet(&self) -> DenseUnet<'_> {
        match self {
            Opened::Pipeline(folder) => folder.as_ref().into(),
            Opened::Unet(folder) => folder.as_ref().into(),
        }
    }

    /// The pipeline, which `what` needs.
    pub(super) fn pipeline(&self, what: &str) -> Result<&PipelineFolder> {
        self.unet().pipeline(what)
    }
}
