//! The calibration samples that a config asks for.

use sdxl_model::checkpoint::{Blueprint, TensorSpec, Weights};
use sdxl_model::scheduler::SchedulerConfig;
use sdxl_model::text::{CLIP_LENGTH, ClipText};
use sdxl_model::unet::{Unet, UnetChain};
use sdxl_pipeline::{Guidance, PipelineFolder, SamplingDefaults};
use squeeze_base::error::{Error, Result};
use squeeze_base::progress::Progress;
use squeeze_numerics::device::Placement;
use tch::Tensor;

use super::{Calls, PromptSet, Sample, Samples, encode, feed, finals, record};
use crate::config::{CalibrationSection, Feed};
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
    let sets = Mix::of(folder, section)?;
    // The encoders are dropped before the UNet is loaded.
    let guidances = tracing::debug_span!("encode").in_scope(|| sets.encoded(folder, placement, progress))?;
    let unet = load_unet(folder, weights, section, options, progress)?;
    let mut samples = sets.recorded(folder, &guidances, &unet, section.calibration_nsamples, progress)?;
    samples.notes.extend(unet.beyond_half().into_iter().map(|note| format!("calibration runs: {note}")));
    Ok(samples)
}

/// The final latents [1, c, h, w] of the prompts of `section`, drawn by the dense pipeline, in the
/// first of the ways in which the section runs them.
///
/// # Errors
/// As [`calibrate`].
pub fn final_latents(
    folder: &PipelineFolder,
    weights: &Weights,
    section: &CalibrationSection,
    options: &RunOptions,
    progress: &dyn Progress,
) -> Result<Vec<Tensor>> {
    let set = PromptSet { prompts: section.prompts.load()?, ..settings(folder, section)? };
    let guidances = encode(folder, &set.encoder(folder, options.placement())?, &set, progress)?;
    let unet = load_unet(folder, weights, section, options, progress)?;
    finals(folder, &guidances, &unet, &set, progress)
}

/// The UNet, in memory as far as the budget goes.
fn load_unet<'a>(
    folder: &PipelineFolder,
    weights: &'a Weights,
    section: &CalibrationSection,
    options: &RunOptions,
    progress: &dyn Progress,
) -> Result<Unet<'a>> {
    let placement = options.placement();
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
    let _span = tracing::debug_span!("load").entered();
    if elements * placement.kind.elt_size_in_bytes() as u64 <= room {
        Unet::resident(folder.unet.clone(), weights.source(placement), progress)
    } else if narrow <= room {
        Unet::resident(folder.unet.clone(), weights.narrow_source(placement), progress)
    } else {
        Unet::one_at_a_time(folder.unet.clone(), weights.narrow_source(placement))
    }
}

/// The prompts of a calibration, divided between its feeds: with two, every second prompt is run in
/// the second way.
struct Mix {
    /// All prompts, in the first way.
    all: PromptSet,
    /// The prompts of each feed.
    sets: Vec<PromptSet>,
}

impl Mix {
    fn of(folder: &PipelineFolder, section: &CalibrationSection) -> Result<Self> {
        let prompts = section.prompts.load()?;
        let all = PromptSet { prompts: prompts.clone(), ..settings(folder, section)? };
        let feeds = &section.mix;
        if feeds.len() > 1 && prompts.len() < feeds.len() {
            return Err(Error::Argument("a mix of two feeds needs two calibration prompts or more".into()));
        }
        let mut sets = Vec::new();
        let mut seed = section.seed;
        for (index, feed) in feeds.iter().enumerate() {
            let prompts: Vec<String> = prompts.iter().skip(index).step_by(feeds.len()).cloned().collect();
            let count = prompts.len() as u64;
            sets.push(PromptSet { prompts, seed, ..settings_for(folder, section, *feed)? });
            seed = seed.wrapping_add(count);
        }
        Ok(Mix { all, sets })
    }

    /// The guidances of each set's prompts.
    fn encoded(&self, folder: &PipelineFolder, placement: Placement, progress: &dyn Progress) -> Result<Vec<Vec<Guidance>>> {
        // One encoder, so that all prompts have as many pieces as the longest of any set.
        let encoder = self.all.encoder(folder, placement)?;
        self.sets.iter().map(|set| encode(folder, &encoder, set, progress)).collect()
    }

    /// Records `wanted` samples, each set's share of them, in turns of the sets' prompts.
    fn recorded(
        &self,
        folder: &PipelineFolder,
        guidances: &[Vec<Guidance>],
        unet: &Unet,
        wanted: usize,
        progress: &dyn Progress,
    ) -> Result<Samples> {
        let ([set], [guidances]) = (self.sets.as_slice(), guidances) else {
            return self.recorded_in_turns(folder, guidances, unet, wanted, progress);
        };
        record(folder, guidances, unet, set, wanted, progress)
    }

    fn recorded_in_turns(
        &self,
        folder: &PipelineFolder,
        guidances: &[Vec<Guidance>],
        unet: &Unet,
        wanted: usize,
        progress: &dyn Progress,
    ) -> Result<Samples> {
        let prompts = self.all.prompts.len();
        let mut samples = Samples::default();
        let mut by_prompt: Vec<Vec<Sample>> = (0..prompts).map(|_| Vec::new()).collect();
        let mut before = 0;
        for (index, (set, guidances)) in self.sets.iter().zip(guidances).enumerate() {
            let own = set.prompts.len();
            let wanted = (before + own) * wanted / prompts - before * wanted / prompts;
            before += own;
            let recorded = record(folder, guidances, unet, set, wanted, progress)?;
            samples.notes.extend(recorded.notes.into_iter().map(|note| format!("{} feed: {note}", set.feed.name())));
            let mut calls = recorded.calls.into_iter();
            for (number, steps) in set.spread_over(own, wanted)?.into_iter().enumerate() {
                by_prompt[number * self.sets.len() + index].extend(calls.by_ref().take(steps.len()));
            }
        }
        samples.calls = by_prompt.into_iter().flatten().collect();
        let shapes = |call: &Sample| (call.sample.size(), call.conditioning.encoder_hidden_states.size());
        if samples.calls.windows(2).any(|pair| shapes(&pair[0]) != shapes(&pair[1])) {
            return Err(Error::Argument(
                "the feeds of `mix` make calls of different shapes: `swift` always has both halves of guidance, so give a guidance \
                 scale above 1, or one feed"
                    .into(),
            ));
        }
        Ok(samples)
    }
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

/// How `section` runs prompts, with no prompts yet; those of its first feed, if it has two.
///
/// # Errors
/// As [`settings_for`].
pub fn settings(folder: &PipelineFolder, section: &CalibrationSection) -> Result<PromptSet> {
    settings_for(folder, section, section.mix.first().copied().unwrap_or_default())
}

/// How `section` runs prompts with a feed, with no prompts yet.
///
/// # Errors
/// [`Error::Argument`] if the model cannot draw pictures of the size, there is no such sampler, the
/// text encoders have not so many layers, or the feed is not for such a model.
pub fn settings_for(folder: &PipelineFolder, section: &CalibrationSection, feed: Feed) -> Result<PromptSet> {
    let CalibrationSection { steps, guidance, .. } = section;
    let defaults = defaults(folder);
    section.reading.check(folder)?;
    Ok(PromptSet {
        prompts: Vec::new(),
        negative_prompt: section.negative_prompt.clone(),
        scheduler: match feed {
            Feed::Diffusers => scheduler(folder, section)?,
            Feed::Swift => {
                feed::check(folder)?;
                feed::scheduler(folder, section)?
            }
        },
        seed: section.seed,
        steps: steps.unwrap_or(defaults.steps),
        guidance: guidance.unwrap_or(defaults.guidance),
        guidance_rescale: section.guidance_rescale,
        denoising_start: denoising_start(folder, section),
        feed,
        reading: section.reading,
        size: folder.picture_size(section.size)?,
    })
}

/// The share of the timesteps, from pure noise on, at which no samples are taken.
#[must_use]
pub fn denoising_start(folder: &PipelineFolder, section: &CalibrationSection) -> f64 {
    let of_model = if folder.requires_aesthetics_score { CalibrationSection::REFINER_START } else { 0.0 };
    section.denoising_start.unwrap_or(of_model)
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
        batch: match set.feed {
            Feed::Diffusers => folder.rows(set.guidance),
            Feed::Swift => 2,
        },
        height: height / scale,
        width: width / scale,
        text: CLIP_LENGTH * set.pieces(folder)? as i64,
    })
}
