//! Records samples from runs of the dense pipeline.

use std::cell::RefCell;

use sdxl_model::scheduler::SchedulerConfig;
use sdxl_model::unet::{Conditioning, Unet};
use sdxl_pipeline::{Guidance, PipelineFolder, Predictor, PromptEncoder, PromptOptions, sample};
use squeeze_base::error::{Error, Result};
use squeeze_base::progress::{Progress, Silent, Task};
use squeeze_numerics::device::Placement;
use squeeze_numerics::random::Generator;
use tch::Tensor;

use super::pictures::{self, PicturesInTurn};
use super::{Sample, Samples, spread};

/// Prompts, and how they are run.
#[derive(Debug, Clone, PartialEq)]
pub struct PromptSet {
    /// The prompts.
    pub prompts: Vec<String>,
    /// The negative prompt of all of them; `None` is the pipeline's default.
    pub negative_prompt: Option<String>,
    /// The sampler.
    pub scheduler: SchedulerConfig,
    /// Seed of the first prompt's noise; each further prompt has the next.
    pub seed: u64,
    /// Denoising steps.
    pub steps: usize,
    /// Guidance scale; 1 is none.
    pub guidance: f64,
    /// The share of the guided prediction whose deviation is brought to that of the prompt's own.
    pub guidance_rescale: f64,
    /// How the prompts are read.
    pub reading: PromptOptions,
    /// Height and width in pixels.
    pub size: (i64, i64),
}

impl PromptSet {
    /// The number of the UNet's calls for each prompt. A sampler may take more steps or fewer than
    /// it was asked for, or call the UNet twice in a step.
    ///
    /// # Errors
    /// If the sampler cannot be made.
    pub fn calls(&self) -> Result<usize> {
        Ok(self.scheduler.scheduler(self.steps)?.timesteps().len())
    }

    /// The pieces of 77 tokens in which each prompt is encoded: as many as the longest has, because
    /// all calls of the UNet are of one shape.
    ///
    /// # Errors
    /// If a tokenizer cannot be read.
    pub fn pieces(&self, folder: &PipelineFolder) -> Result<usize> {
        self.reading.pieces(folder, self.prompts.iter().chain(&self.negative_prompt).map(String::as_str))
    }

    /// The encoder that reads the prompts.
    ///
    /// # Errors
    /// As [`PromptEncoder::load`].
    pub fn encoder(&self, folder: &PipelineFolder, placement: Placement) -> Result<PromptEncoder> {
        let encoder = PromptEncoder::load(folder, placement)?;
        Ok(encoder.with_options(self.reading).with_pieces(self.pieces(folder)?))
    }

    /// The guidance of a prompt.
    ///
    /// # Errors
    /// If it cannot be encoded.
    pub fn guidance_of(&self, prompt: &str, folder: &PipelineFolder, encoder: &PromptEncoder) -> Result<Guidance> {
        let negative = self.negative_prompt.as_deref();
        let guidance = Guidance::encode(encoder, folder, prompt, negative, self.guidance, self.size)?;
        Ok(Guidance { rescale: self.guidance_rescale, ..guidance })
    }
}

/// The guidance of every prompt, after which the encoders are not needed any more.
///
/// # Errors
/// If a prompt cannot be encoded.
pub fn encode(
    folder: &PipelineFolder,
    encoder: &PromptEncoder,
    set: &PromptSet,
    progress: &dyn Progress,
) -> Result<Vec<Guidance>> {
    let task = Task::begin(progress, "encoding", "prompts", set.prompts.len());
    let one = |prompt: &String| {
        task.advance(prompt);
        set.guidance_of(prompt, folder, encoder)
    };
    set.prompts.iter().map(one).collect()
}

/// Runs every prompt through the dense pipeline and keeps `wanted` calls of
/// the UNet, spread evenly over prompts and timesteps. `guidances` are the prompts as [`encode`]
/// gives them.
///
/// # Errors
/// If there are no prompts, or the pipeline cannot run.
pub fn record(
    folder: &PipelineFolder,
    guidances: &[Guidance],
    unet: &Unet,
    set: &PromptSet,
    wanted: usize,
    progress: &dyn Progress,
) -> Result<Samples> {
    if set.prompts.is_empty() {
        return Err(Error::Argument("there are no calibration prompts".into()));
    }
    let scale = folder.vae.scale();
    let shape = [1, folder.vae.latent_channels, set.size.0 / scale, set.size.1 / scale];
    let mut samples = Samples::default();
    let steps = set.calls()?;
    let available = set.prompts.len() * steps;
    if available < wanted {
        samples
            .notes
            .push(format!("{wanted} samples were asked for; {} prompts of {steps} calls have {available}", set.prompts.len()));
    }
    let kept = spread(set.prompts.len(), steps, wanted);
    let mut pictures = None;
    if let Some(Guidance { conditioning: Conditioning { encoder_hidden_states: like, .. }, .. }) = guidances.first() {
        pictures = PicturesInTurn::load(folder, set.size, Placement { device: like.device(), kind: like.f_kind()? })?;
    }
    samples.notes.extend(pictures.as_ref().map(|_| pictures::NOTE.to_owned()));
    let task = Task::begin(progress, "calibration runs", "prompts", set.prompts.len());
    for (index, ((prompt, guidance), steps)) in set.prompts.iter().zip(guidances).zip(kept).enumerate() {
        task.go_on()?;
        task.advance(prompt);
        if steps.is_empty() {
            continue;
        }
        let like = &guidance.conditioning.encoder_hidden_states;
        let mut scheduler = set.scheduler.scheduler(set.steps)?;
        let seed = set.seed.wrapping_add(index as u64);
        let mut generator = Generator::new(seed);
        let noise = generator.draw(&shape, like.f_kind()?)?.f_to_device(like.device())?;
        let with_picture = pictures.as_ref().map(|pictures| pictures.show(guidance, index, seed)).transpose()?;
        let guidance = with_picture.as_ref().unwrap_or(guidance);
        let recorder = Recorder { unet, steps: &steps, calls: RefCell::new((0, Vec::new())) };
        let latents = sample(&recorder, scheduler.as_mut(), guidance, &noise, &mut generator, &mut |_, _| Ok(()), &Silent)?;
        if let Some(pictures) = &mut pictures {
            pictures.keep(&latents)?;
        }
        samples.calls.extend(recorder.calls.into_inner().1);
    }
    Ok(samples)
}

/// A UNet that keeps some of its calls.
struct Recorder<'a, 'b> {
    unet: &'a Unet<'b>,
    steps: &'a [usize],
    calls: RefCell<(usize, Vec<Sample>)>,
}

impl Predictor for Recorder<'_, '_> {
    fn predict(&self, sample: &Tensor, timestep: f64, conditioning: &Conditioning) -> Result<Tensor> {
        let (step, calls) = &mut *self.calls.borrow_mut();
        if self.steps.contains(step) {
            calls.push(Sample { sample: sample.shallow_clone(), timestep, conditioning: conditioning.shallow_clone() });
        }
        *step += 1;
        self.unet.predict(sample, timestep, conditioning)
    }
}
