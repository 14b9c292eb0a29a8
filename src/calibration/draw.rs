//! The calibration samples that a config asks for.

use sdxl_model::checkpoint::{Blueprint, TensorSpec, Weights};
use sdxl_model::scheduler::SchedulerConfig;
use sdxl_model::text::{CLIP_LENGTH, ClipText};
use sdxl_model::unet::{Unet, UnetChain};
use sdxl_pipeline::{PipelineFolder, SamplingDefaults};
use squeeze_base::error::Result;
use squeeze_base::progress::Progress;

use super::{Calls, PromptSet, Samples, encode, record};
use crate::config::CalibrationSection;
use crate::recipe::RunOptions;

/// The calibration samples that `section` asks for: read from its file, or recorded from its
/// prompts.
///
/// The UNet is kept in memory as far as the budget goes: in the dtype of its activations, in the
/// dtype of its checkpoint, or one stage at a time.
///
/// # Errors
/// If the file or the prompts cannot be read, or the pipeline cannot run.
pub fn calibrate(
    folder: &PipelineFolder,
    weights: &Weights,
    section: &CalibrationSection,
    options: &RunOptions,
    progress: &dyn Progress,
) -> Result<Samples> {
    if let Some(path) = &section.samples {
        return Samples::read(path, folder.unet.config(), section.calibration_nsamples);
    }
    let placement = options.placement();
    let set = PromptSet { prompts: section.prompts.load()?, ..settings(folder, section)? };
    // The encoders are dropped before the UNet is loaded.
    let guidances =
        tracing::debug_span!("encode").in_scope(|| encode(folder, &set.encoder(folder, placement)?, &set, progress))?;
    let elements: u64 = folder.unet.tensors()?.iter().map(|tensor| tensor.numel()).sum();
    let narrow: u64 = weights
        .entries()
        .map(|(name, entry)| {
            // Tensors that are not floating point are converted to fp32.
            let bytes = weights.narrow_bytes(name, placement).unwrap_or(4) as u64;
            entry.shape.iter().product::<i64>().unsigned_abs() * bytes
        })
        .sum();
    // A reserve for the program, on a GPU for CUDA.
    let mut room = options.memory_budget()?.saturating_sub(1 << 30);
    if placement.device.is_cuda() {
        let calls = expected_calls(folder, section)?;
        room = room.saturating_sub(drawing_activations(&folder.unet, &calls, placement.kind.elt_size_in_bytes() as u64));
    }
    let loading = tracing::debug_span!("load").entered();
    let unet = if elements * placement.kind.elt_size_in_bytes() as u64 <= room {
        Unet::resident(folder.unet.clone(), weights.source(placement), progress)?
    } else if narrow <= room {
        Unet::resident(folder.unet.clone(), weights.narrow_source(placement), progress)?
    } else {
        Unet::one_at_a_time(folder.unet.clone(), weights.narrow_source(placement))?
    };
    drop(loading);
    let mut samples = record(folder, &guidances, &unet, &set, section.calibration_nsamples, progress)?;
    samples.notes.extend(unet.beyond_half().into_iter().map(|note| format!("calibration runs: {note}")));
    Ok(samples)
}

/// Bytes of the activations while a GPU draws samples, in batches of its own: some four times the
/// carry at its largest, most of which are the columns and the output of the widest convolution.
pub(crate) fn drawing_activations(chain: &UnetChain, calls: &Calls, element_bytes: u64) -> u64 {
    let mut carry = chain.first_carry(calls.height, calls.width);
    let mut largest = carry.numel();
    for stage in chain.stages() {
        carry = stage.after(&carry);
        largest = largest.max(carry.numel());
    }
    // Each prompt that is drawn gives a sample or more.
    let prompts = Calls::drawn_together(calls.batch, calls.height, calls.width).min(calls.count.max(1) as i64);
    let rows = calls.batch * prompts;
    4 * element_bytes * (rows * largest).unsigned_abs()
}

/// Bytes of the pipeline's text encoders with weights of `element_bytes`.
///
/// # Errors
/// If their configs do not fit together.
pub fn encoder_bytes(folder: &PipelineFolder, element_bytes: u64) -> Result<u64> {
    let mut elements = 0;
    for part in &folder.text_encoders {
        let blueprint = Blueprint::default();
        ClipText::load(&part.config, &blueprint)?;
        elements += blueprint.into_tensors().iter().map(TensorSpec::numel).sum::<u64>();
    }
    Ok(element_bytes * elements)
}

/// The sampler that `section` asks for.
///
/// # Errors
/// [`Error::Argument`](squeeze_base::error::Error::Argument) if there is no such sampler, or it has
/// no spacing or no η to choose.
pub fn scheduler(folder: &PipelineFolder, section: &CalibrationSection) -> Result<SchedulerConfig> {
    folder.scheduler.with_choices(section.scheduler.as_deref(), section.timestep_spacing, section.eta)
}

/// How `section` runs prompts, with no prompts yet.
///
/// # Errors
/// [`Error::Argument`](squeeze_base::error::Error::Argument) if the model cannot draw pictures of
/// the size, there is no such sampler, or the text encoders have not so many layers.
pub fn settings(folder: &PipelineFolder, section: &CalibrationSection) -> Result<PromptSet> {
    let CalibrationSection { steps, guidance, .. } = section;
    let defaults = defaults(folder);
    section.reading.check(folder)?;
    Ok(PromptSet {
        prompts: Vec::new(),
        negative_prompt: section.negative_prompt.clone(),
        scheduler: scheduler(folder, section)?,
        seed: section.seed,
        steps: steps.unwrap_or(defaults.steps),
        guidance: guidance.unwrap_or(defaults.guidance),
        guidance_rescale: section.guidance_rescale,
        reading: section.reading,
        size: folder.picture_size(section.size)?,
    })
}

/// Steps and guidance of the calibration runs of a model, where the config gives none.
#[must_use]
pub fn defaults(folder: &PipelineFolder) -> SamplingDefaults {
    SamplingDefaults::of(folder, CalibrationSection::STEPS, CalibrationSection::GUIDANCE)
}

/// What `defaults` hint at that `section` leaves open; `None` for samples that are not drawn.
#[must_use]
pub fn hint<'a>(defaults: &'a SamplingDefaults, section: &CalibrationSection) -> Option<&'a str> {
    if section.samples.is_some() {
        return None;
    }
    let has_sampler = section.scheduler.is_some() || section.timestep_spacing.is_some();
    defaults.open_hint(section.steps.is_some() && section.guidance.is_some(), has_sampler)
}

/// The number and shape of the samples that `section` asks for, before any of them is drawn.
///
/// # Errors
/// If the model cannot draw pictures of the size, or a samples file cannot be read.
pub fn expected_calls(folder: &PipelineFolder, section: &CalibrationSection) -> Result<Calls> {
    if let Some(path) = &section.samples {
        return Samples::calls_in(path, folder.unet.config(), section.calibration_nsamples);
    }
    // Whether the prompts can be read is checked where they are needed.
    let prompts = if section.reading.long_prompts { section.prompts.load().unwrap_or_default() } else { Vec::new() };
    let set = PromptSet { prompts, ..settings(folder, section)? };
    let (height, width) = set.size;
    let scale = folder.vae.scale();
    Ok(Calls {
        count: section.calibration_nsamples,
        batch: folder.rows(set.guidance),
        height: height / scale,
        width: width / scale,
        text: CLIP_LENGTH * set.pieces(folder)? as i64,
    })
}
