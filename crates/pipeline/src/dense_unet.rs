//! The dense UNet that a run compresses: that of a pipeline, or one that people have alone.

use std::path::Path;

use sdxl_model::checkpoint::{SourceFile, Weights};
use sdxl_model::unet::UnetChain;
use serde_json::{Map, Value};
use squeeze_base::error::{Error, Result};

use super::folder::PipelineFolder;
use super::missing;
use super::unet_folder::UnetFolder;

/// A dense UNet. One alone has no text encoders, no sampler and no VAE, so that nothing can be
/// drawn with it: it does for runs that need no calibration.
#[derive(Debug, Clone, Copy)]
pub enum DenseUnet<'a> {
    /// The UNet of a pipeline.
    OfPipeline(&'a PipelineFolder),
    /// A UNet alone.
    Alone(&'a UnetFolder),
}

impl<'a> From<&'a PipelineFolder> for DenseUnet<'a> {
    fn from(folder: &'a PipelineFolder) -> Self {
        DenseUnet::OfPipeline(folder)
    }
}

impl<'a> From<&'a UnetFolder> for DenseUnet<'a> {
    fn from(folder: &'a UnetFolder) -> Self {
        DenseUnet::Alone(folder)
    }
}

impl<'a> DenseUnet<'a> {
    /// The folder or the checkpoint that the model was opened from.
    #[must_use]
    pub fn path(self) -> &'a Path {
        match self {
            DenseUnet::OfPipeline(folder) => folder.root(),
            DenseUnet::Alone(folder) => &folder.path,
        }
    }

    /// The chain of stages.
    #[must_use]
    pub fn chain(self) -> &'a UnetChain {
        match self {
            DenseUnet::OfPipeline(folder) => &folder.unet,
            DenseUnet::Alone(folder) => &folder.chain,
        }
    }

    /// `config.json`, every entry as it was when the model was opened.
    #[must_use]
    pub fn config(self) -> &'a Map<String, Value> {
        match self {
            DenseUnet::OfPipeline(folder) => folder.unet_config(),
            DenseUnet::Alone(folder) => &folder.config,
        }
    }

    /// The length and hash of `config.json`; `None` if the tensors of a checkpoint told the
    /// architecture.
    #[must_use]
    pub fn config_file(self) -> Option<&'a SourceFile> {
        match self {
            DenseUnet::OfPipeline(folder) => folder.unet_config_file(),
            DenseUnet::Alone(folder) => Some(&folder.config_file),
        }
    }

    /// What stands before the names of the UNet's files in the list of a container's sources. The
    /// files of a UNet alone are named as in a pipeline, whatever its folder is called, so that the
    /// container is the same.
    #[must_use]
    pub fn folder(self) -> &'static str {
        match self {
            DenseUnet::OfPipeline(folder) => folder.unet_folder(),
            DenseUnet::Alone(_) => UnetFolder::IN_PIPELINE,
        }
    }

    /// The weights, checked against the config, with the LoRAs of the pipeline.
    ///
    /// # Errors
    /// As [`PipelineFolder::unet_weights`].
    pub fn weights(self) -> Result<Weights> {
        match self {
            DenseUnet::OfPipeline(folder) => folder.unet_weights(),
            DenseUnet::Alone(folder) => Ok(folder.weights.clone()),
        }
    }

    /// The files of the LoRAs, each with its scale and hash.
    ///
    /// # Errors
    /// As [`PipelineFolder::lora_files`].
    pub fn lora_files(self) -> Result<Vec<SourceFile>> {
        match self {
            DenseUnet::OfPipeline(folder) => folder.lora_files(),
            DenseUnet::Alone(_) => Ok(Vec::new()),
        }
    }

    /// What the UNet predicts (`epsilon`, `v_prediction`, `sample`); `None` for one alone, because
    /// only the config of the pipeline's sampler says it.
    #[must_use]
    pub fn prediction_type(self) -> Option<&'a str> {
        match self {
            DenseUnet::OfPipeline(folder) => Some(folder.scheduler.prediction()),
            DenseUnet::Alone(_) => None,
        }
    }

    /// The pipeline. `what` needs it, and begins the sentence that says so.
    ///
    /// # Errors
    /// [`Error::Argument`] for a UNet alone, with what to give in its place.
    pub fn pipeline(self, what: &str) -> Result<&'a PipelineFolder> {
        match self {
            DenseUnet::OfPipeline(folder) => Ok(folder),
            DenseUnet::Alone(folder) => {
                let given = missing::what_it_is(&folder.path);
                Err(Error::Argument(format!("{what} needs the pipeline and not its UNet alone; {given}")))
            }
        }
    }
}
