//! What Apple's Swift pipeline (`ml-stable-diffusion`, `StableDiffusionXLPipeline.swift`) gives the
//! UNet where diffusers gives something else.

use sdxl_model::scheduler::SchedulerConfig;
use sdxl_pipeline::{Guidance, ImageChannels, PipelineFolder, PromptEncoder};
use squeeze_base::error::{Error, Result};

use crate::config::CalibrationSection;

/// Height and width that the time ids tell, whatever the size of the picture.
const TOLD_SIZE: (i64, i64) = (1024, 1024);

/// Checks that the Swift pipeline can run the model.
///
/// # Errors
/// [`Error::Argument`] if it cannot.
pub(super) fn check(folder: &PipelineFolder) -> Result<()> {
    let refuse = |what: &str| Err(Error::Argument(format!("`swift` feeds no {what}, as Apple's Swift pipeline runs none")));
    if folder.unet.config().time_cond_proj_dim.is_some() {
        return refuse("UNet that is told the guidance scale");
    }
    if folder.image_channels() != ImageChannels::None {
        return refuse("inpainting or edit model");
    }
    match folder.scheduler.text("prediction_type") {
        None | Some("epsilon") => Ok(()),
        // The package of such a model makes noise, and Apple's PNDM combines this noise, where PLMS
        // here combines the predictions.
        Some(other) => Err(Error::Argument(format!(
            "`swift` feeds no model that predicts `{other}`: Apple's pipeline samples the noise that a package makes of it, \
             and no sampler here does"
        ))),
    }
}

/// The sampler: DPM++ 2M if `section` asks for it, else PLMS, which is the pipeline's default.
///
/// # Errors
/// As [`SchedulerConfig::with_choices`].
pub(super) fn scheduler(folder: &PipelineFolder, section: &CalibrationSection) -> Result<SchedulerConfig> {
    let is_dpm = |name: &&str| ["dpmpp-2m", "dpmpp-2m-karras", "DPMSolverMultistepScheduler"].contains(name);
    let name = section.scheduler.as_deref().filter(is_dpm).unwrap_or("plms");
    folder.scheduler.with_choices(Some(name), section.timestep_spacing, section.eta)
}

/// The guidance of a prompt: with the encoded negative prompt, empty where there is none, and both
/// halves at every scale.
///
/// # Errors
/// If a text cannot be encoded.
pub(super) fn guidance(
    prompt: &str,
    negative: Option<&str>,
    scale: f64,
    folder: &PipelineFolder,
    encoder: &PromptEncoder,
) -> Result<Guidance> {
    // A scale above 1 gives both halves.
    let both = Guidance::encode(encoder, folder, prompt, Some(negative.unwrap_or_default()), scale.max(2.0), TOLD_SIZE)?;
    Ok(Guidance { scale: Some(scale), ..both })
}

/// As [`guidance`], of several prompts that are encoded in one batch.
///
/// # Errors
/// If a text cannot be encoded.
pub(super) fn guidances(
    prompts: &[&str],
    negative: Option<&str>,
    scale: f64,
    folder: &PipelineFolder,
    encoder: &PromptEncoder,
) -> Result<Vec<Guidance>> {
    let both = Guidance::encode_all(encoder, folder, prompts, Some(negative.unwrap_or_default()), scale.max(2.0), TOLD_SIZE)?;
    Ok(both.into_iter().map(|guidance| Guidance { scale: Some(scale), ..guidance }).collect())
}
