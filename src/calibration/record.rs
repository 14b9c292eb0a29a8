//! Records samples from runs of the dense pipeline.

use sdxl_model::scheduler::{Scheduler, SchedulerConfig};
use sdxl_model::unet::{Conditioning, Unet};
use sdxl_pipeline::{Denoised, Guidance, PipelineFolder, PromptEncoder, PromptOptions};
use squeeze_base::error::{Error, Result};
use squeeze_base::progress::{Progress, Task};
use squeeze_numerics::device::Placement;
use squeeze_numerics::random::Generator;
use tch::{Device, Tensor};

use super::pictures::{self, PicturesInTurn};
use super::{Calls, Sample, Samples, feed, spread};
use crate::config::Feed;

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
    /// The share of the timesteps, from pure noise on, at which no samples are taken.
    pub denoising_start: f64,
    /// Denoising steps.
    pub steps: usize,
    /// Guidance scale; 1 is none.
    pub guidance: f64,
    /// The share of the guided prediction whose deviation is brought to that of the prompt's own.
    pub guidance_rescale: f64,
    /// What the UNet is given beside the latents.
    pub feed: Feed,
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

    /// The timesteps that the model was trained on and is used at, in no order.
    ///
    /// # Errors
    /// As [`calls`](Self::calls).
    pub fn used_timesteps(&self) -> Result<Vec<f64>> {
        let before = self.end_of_used()?;
        let timesteps = self.scheduler.training_timesteps()?.into_iter();
        Ok(timesteps.filter(|timestep| before.is_none_or(|before| *timestep < before)).collect())
    }

    /// The lowest timestep of training that is not used, of which there is one below; `None` if all
    /// are used.
    fn end_of_used(&self) -> Result<Option<f64>> {
        if self.denoising_start == 0.0 {
            return Ok(None);
        }
        let mut timesteps = self.scheduler.training_timesteps()?;
        timesteps.sort_by(f64::total_cmp);
        // `discrete_timestep_cutoff` in diffusers' `get_timesteps`.
        let count = timesteps.len() as f64;
        let used = (count - self.denoising_start * count).round_ties_even() as usize;
        Ok(timesteps.get(used.max(1)).copied())
    }

    /// The first of the UNet's calls for a prompt of which samples are taken. The calls before it
    /// are at timesteps at which another model is used.
    ///
    /// # Errors
    /// [`Error::Argument`] if none of the calls is late enough; if the sampler cannot be made.
    pub fn first_used(&self) -> Result<usize> {
        let Some(before) = self.end_of_used()? else { return Ok(0) };
        let (start, steps) = (self.denoising_start, self.steps);
        let timesteps = self.scheduler.scheduler(steps)?.timesteps().to_vec();
        timesteps.iter().position(|timestep| *timestep < before).ok_or_else(|| {
            Error::Argument(format!("none of {steps} steps is after the share {start} of `denoising_start`; give more steps"))
        })
    }

    /// The number of the UNet's calls for each prompt of which samples are taken.
    ///
    /// # Errors
    /// As [`calls`](Self::calls) and [`first_used`](Self::first_used).
    pub fn used_calls(&self) -> Result<usize> {
        Ok(self.calls()? - self.first_used()?)
    }

    /// The choice of `wanted` calls out of those of `runs` runs that are used: for each its steps,
    /// as [`spread`] chooses them.
    ///
    /// # Errors
    /// As [`used_calls`](Self::used_calls).
    pub fn spread_over(&self, runs: usize, wanted: usize) -> Result<Vec<Vec<usize>>> {
        let first = self.first_used()?;
        let kept = spread(runs, self.calls()? - first, wanted);
        Ok(kept.into_iter().map(|steps| steps.into_iter().map(|step| first + step).collect()).collect())
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
        let guidance = match self.feed {
            Feed::Diffusers => Guidance::encode(encoder, folder, prompt, negative, self.guidance, self.size)?,
            Feed::Swift => feed::guidance(prompt, negative, self.guidance, folder, encoder)?,
        };
        Ok(Guidance { rescale: self.guidance_rescale, ..guidance })
    }

    /// The guidances of several prompts, which are encoded in one batch.
    ///
    /// # Errors
    /// If one cannot be encoded.
    pub fn guidances_of(&self, prompts: &[&str], folder: &PipelineFolder, encoder: &PromptEncoder) -> Result<Vec<Guidance>> {
        let negative = self.negative_prompt.as_deref();
        let guidances = match self.feed {
            Feed::Diffusers => Guidance::encode_all(encoder, folder, prompts, negative, self.guidance, self.size)?,
            Feed::Swift => feed::guidances(prompts, negative, self.guidance, folder, encoder)?,
        };
        Ok(guidances.into_iter().map(|guidance| Guidance { rescale: self.guidance_rescale, ..guidance }).collect())
    }
}

/// The number of prompts that are encoded in one batch: on a CPU one. It does not depend on the
/// memory, because a batch of another size has another rounding.
#[must_use]
pub fn prompts_together(device: Device) -> usize {
    if device == Device::Cpu { 1 } else { 64 }
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
    let mut guidances = Vec::with_capacity(set.prompts.len());
    for prompts in set.prompts.chunks(prompts_together(encoder.placement().device)) {
        prompts.iter().for_each(|prompt| task.advance(prompt));
        match prompts {
            [prompt] => guidances.push(set.guidance_of(prompt, folder, encoder)?),
            prompts => {
                let prompts: Vec<&str> = prompts.iter().map(String::as_str).collect();
                guidances.extend(set.guidances_of(&prompts, folder, encoder)?);
            }
        }
    }
    Ok(guidances)
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
    let mut samples = Samples::default();
    let steps = set.used_calls()?;
    let available = set.prompts.len() * steps;
    if available < wanted {
        samples
            .notes
            .push(format!("{wanted} samples were asked for; {} prompts of {steps} calls have {available}", set.prompts.len()));
    }
    let kept = set.spread_over(set.prompts.len(), wanted)?;
    if set.denoising_start > 0.0 {
        samples.notes.push(format!(
            "samples are taken after the share {} of the timesteps (`denoising_start`): of {steps} of the {} calls for each prompt",
            set.denoising_start,
            set.calls()?
        ));
    }
    let runs: Vec<Planned<'_>> = set
        .prompts
        .iter()
        .zip(guidances)
        .zip(&kept)
        .enumerate()
        .filter(|(_, (_, steps))| !steps.is_empty())
        .map(|(index, ((prompt, guidance), steps))| Planned { index, prompt, guidance, steps })
        .collect();
    let shows = run_all(folder, unet, (set, guidances), &runs, progress, &mut |calls, _| samples.calls.extend(calls))?;
    samples.notes.extend(shows.then(|| pictures::NOTE.to_owned()));
    Ok(samples)
}

/// The final latents [1, c, h, w] of every prompt of `set`, run through the dense pipeline.
///
/// # Errors
/// As [`record`].
pub fn finals(
    folder: &PipelineFolder,
    guidances: &[Guidance],
    unet: &Unet,
    set: &PromptSet,
    progress: &dyn Progress,
) -> Result<Vec<Tensor>> {
    let mut finals = Vec::new();
    let planned = |(index, (prompt, guidance))| Planned { index, prompt, guidance, steps: &[] };
    let runs: Vec<Planned<'_>> = set.prompts.iter().map(String::as_str).zip(guidances).enumerate().map(planned).collect();
    run_all(folder, unet, (set, guidances), &runs, progress, &mut |_, latents| finals.extend(latents))?;
    Ok(finals)
}

/// Runs the prompts of `runs` through the dense pipeline, and hands the kept calls and the final
/// latents of each batch to `done`. Returns whether the UNet was shown pictures.
fn run_all(
    folder: &PipelineFolder,
    unet: &Unet,
    (set, guidances): (&PromptSet, &[Guidance]),
    runs: &[Planned<'_>],
    progress: &dyn Progress,
    done: &mut dyn FnMut(Vec<Sample>, Vec<Tensor>),
) -> Result<bool> {
    let scale = folder.vae.scale();
    let shape = [1, folder.vae.latent_channels, set.size.0 / scale, set.size.1 / scale];
    let mut pictures = None;
    if let Some(Guidance { conditioning: Conditioning { encoder_hidden_states: like, .. }, .. }) = guidances.first() {
        pictures = PicturesInTurn::load(folder, set.size, Placement { device: like.device(), kind: like.f_kind()? })?;
    }
    let task = Task::begin(progress, "calibration runs", "prompts", set.prompts.len());
    // A picture that is shown is made by the prompt before.
    let together = if pictures.is_some() { 1 } else { runs_together(guidances, (shape[2], shape[3])) };
    for runs in runs.chunks(together) {
        task.go_on()?;
        runs.iter().for_each(|run| task.advance(run.prompt));
        let mut seeds: Vec<Seeded> = runs.iter().map(|run| Seeded::new(set, run, &shape)).collect::<Result<_>>()?;
        let shown = match (&pictures, runs) {
            (Some(pictures), [run]) => Some(pictures.show(run.guidance, run.index, set.seed.wrapping_add(run.index as u64))?),
            (_, _) => None,
        };
        let pairs = runs.iter().zip(&mut seeds);
        let denoised = pairs.map(|(run, seeded)| {
            let Seeded { scheduler, noise, generator } = seeded;
            Denoised::from_noise(scheduler.as_mut(), shown.as_ref().unwrap_or(run.guidance), noise, generator)
        });
        let denoised: Vec<Denoised<'_>> = denoised.collect::<Result<_>>()?;
        let (calls, latents) = run_together(unet, runs, denoised, shown.as_ref())?;
        if let (Some(pictures), [latents]) = (&mut pictures, latents.as_slice()) {
            pictures.keep(latents)?;
        }
        done(calls, latents);
    }
    Ok(pictures.is_some())
}

/// A prompt that is to be run.
#[derive(Clone, Copy)]
struct Planned<'a> {
    index: usize,
    prompt: &'a str,
    guidance: &'a Guidance,
    /// The calls that are kept.
    steps: &'a [usize],
}

/// A prompt's own sampler and noise.
struct Seeded {
    scheduler: Box<dyn Scheduler>,
    noise: Tensor,
    generator: Generator,
}

impl Seeded {
    fn new(set: &PromptSet, run: &Planned<'_>, shape: &[i64; 4]) -> Result<Self> {
        let like = &run.guidance.conditioning.encoder_hidden_states;
        let mut generator = Generator::new(set.seed.wrapping_add(run.index as u64));
        let noise = generator.draw(shape, like.f_kind()?)?.f_to_device(like.device())?;
        Ok(Seeded { scheduler: set.scheduler.scheduler(set.steps)?, noise, generator })
    }
}

/// The number of prompts that are run in one batch: on a CPU one.
fn runs_together(guidances: &[Guidance], latents: (i64, i64)) -> usize {
    let Some(like) = guidances.first().map(|guidance| &guidance.conditioning.encoder_hidden_states) else { return 1 };
    if like.device() == Device::Cpu {
        return 1;
    }
    let rows = like.size().first().copied().unwrap_or(1);
    Calls::drawn_together(rows, latents.0, latents.1) as usize
}

/// Runs prompts step by step, all in one batch where their conditioning has one shape. Returns the
/// kept calls of each prompt in turn, and the final latents.
fn run_together(
    unet: &Unet<'_>,
    runs: &[Planned<'_>],
    mut denoised: Vec<Denoised<'_>>,
    shown: Option<&Guidance>,
) -> Result<(Vec<Sample>, Vec<Tensor>)> {
    let of_runs: Vec<&Conditioning> = runs.iter().map(|run| &shown.unwrap_or(run.guidance).conditioning).collect();
    let joined = if runs.len() > 1 { Conditioning::join(&of_runs)? } else { None };
    let timesteps = denoised.first().map_or_else(Vec::new, |first| first.timesteps().to_vec());
    let mut kept: Vec<Vec<Sample>> = runs.iter().map(|_| Vec::new()).collect();
    for (step, timestep) in timesteps.into_iter().enumerate() {
        let inputs = denoised.iter().map(|picture| picture.input(step)).collect::<Result<Vec<_>>>()?;
        for (((run, input), conditioning), kept) in runs.iter().zip(&inputs).zip(&of_runs).zip(&mut kept) {
            if run.steps.contains(&step) {
                kept.push(Sample { sample: input.shallow_clone(), timestep, conditioning: conditioning.shallow_clone() });
            }
        }
        let predictions = match &joined {
            Some(joined) => {
                let rows = inputs[0].size4()?.0;
                let all = unet.predict(&Tensor::f_cat(&inputs, 0)?, timestep, joined)?;
                (0..runs.len() as i64).map(|run| Ok(all.f_narrow(0, run * rows, rows)?)).collect::<Result<Vec<_>>>()?
            }
            None => {
                let each = inputs.iter().zip(&of_runs);
                each.map(|(input, conditioning)| unet.predict(input, timestep, conditioning)).collect::<Result<Vec<_>>>()?
            }
        };
        for (picture, prediction) in denoised.iter_mut().zip(&predictions) {
            picture.step(step, prediction)?;
        }
    }
    let latents = denoised.iter().map(|picture| picture.latents().shallow_clone()).collect();
    Ok((kept.into_iter().flatten().collect(), latents))
}
