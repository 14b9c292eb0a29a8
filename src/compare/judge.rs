//! The judge: how close a compressed UNet stays to the dense one, on prompts outside of the
//! calibration.

use std::cell::RefCell;

use sdxl_model::Unobserved;
use sdxl_model::checkpoint::TensorSource;
use sdxl_model::unet::{Carry, Conditioning, StageName, Unet, UnetChain};
use sdxl_model::vae::VaeDecoder;
use sdxl_pipeline::picture::Picture;
use sdxl_pipeline::{Guidance, PipelineFolder, Predictor, PromptEncoder, decode_with, load_vae, sample};
use squeeze_base::error::{Error, Result};
use squeeze_base::progress::{Progress, Silent, Task};
use squeeze_numerics::random::Generator;
use squeeze_numerics::sum::{self, sum_kind};
use tch::Tensor;

use crate::calibration::{PicturesInTurn, PromptSet, Sample, spread};

/// The dense model's runs on the judged prompts: the reference of every measurement.
pub struct Judge {
    runs: Vec<Run>,
    held_out: Vec<HeldOut>,
    set: PromptSet,
    vae: VaeDecoder,
}

struct Run {
    guidance: Guidance,
    seed: u64,
    latents: Vec<Tensor>,
    picture: Picture,
}

/// A call of the dense UNet, and its output.
struct HeldOut {
    call: Sample,
    output: Tensor,
}

/// Measurements of a compressed UNet.
#[derive(Debug)]
pub struct Measured {
    /// ‖compressed - dense‖² / ‖dense‖² over the outputs of all held-out calls.
    pub unet_error: f64,
    /// ‖compressed - dense‖² / ‖dense‖² of the latents after each step, mean over the prompts.
    pub latent_error_by_step: Vec<f64>,
    /// One picture for each prompt.
    pub pictures: Vec<Picture>,
}

impl Judge {
    /// Runs the dense `unet` on every prompt of `set` and keeps `held_out` of its calls, spread
    /// over prompts and timesteps.
    ///
    /// # Errors
    /// [`Error::Argument`] if `set` has no prompts; if the pipeline cannot run.
    pub fn record(
        folder: &PipelineFolder,
        encoder: &PromptEncoder,
        unet: &Unet,
        set: PromptSet,
        held_out: usize,
        progress: &dyn Progress,
    ) -> Result<Self> {
        if set.prompts.is_empty() {
            return Err(Error::Argument("there are no prompts to judge on".into()));
        }
        let placement = encoder.placement();
        let steps = set.calls()?;
        let kept = spread(set.prompts.len(), steps, held_out);
        let vae = load_vae(folder, placement)?;
        let mut pictures = PicturesInTurn::load(folder, set.size, placement)?;
        let mut judge = Judge { runs: Vec::new(), held_out: Vec::new(), set, vae };
        let task = Task::begin(progress, "dense pictures", "prompts", judge.set.prompts.len());
        for (index, (prompt, steps)) in judge.set.prompts.iter().zip(kept).enumerate() {
            task.advance(prompt);
            let guidance = judge.set.guidance_of(prompt, folder, encoder)?;
            let seed = judge.set.seed.wrapping_add(index as u64);
            let guidance = match &pictures {
                Some(pictures) => pictures.show(&guidance, index, seed)?,
                None => guidance,
            };
            let watcher = Watcher { unet, steps, calls: RefCell::new((0, Vec::new())) };
            let latents = judge.latents(folder, &watcher, &guidance, seed)?;
            judge.held_out.extend(watcher.calls.into_inner().1);
            if let (Some(pictures), Some(last)) = (&mut pictures, latents.last()) {
                pictures.keep(last)?;
            }
            let picture = judge.picture(latents.last())?;
            judge.runs.push(Run { guidance, seed, latents, picture });
        }
        Ok(judge)
    }

    /// The latents after each step.
    fn latents(&self, folder: &PipelineFolder, unet: &dyn Predictor, guidance: &Guidance, seed: u64) -> Result<Vec<Tensor>> {
        let mut scheduler = self.set.scheduler.scheduler(self.set.steps)?;
        let scale = folder.vae.scale();
        let shape = [1, folder.vae.latent_channels, self.set.size.0 / scale, self.set.size.1 / scale];
        let like = &guidance.conditioning.encoder_hidden_states;
        let mut generator = Generator::new(seed);
        let noise = generator.draw(&shape, like.f_kind()?)?.f_to_device(like.device())?;
        let mut latents = Vec::new();
        let mut keep = |_: usize, after: &Tensor| {
            latents.push(after.shallow_clone());
            Ok(())
        };
        let _last = sample(unet, scheduler.as_mut(), guidance, &noise, &mut generator, &mut keep, &Silent)?;
        Ok(latents)
    }

    fn picture(&self, latents: Option<&Tensor>) -> Result<Picture> {
        let latents = latents.ok_or_else(|| Error::Failed("the sampler took no step".into()))?;
        decode_with(&self.vae, latents)
    }

    /// The dense model's pictures, one for each prompt.
    pub fn pictures(&self) -> impl Iterator<Item = &Picture> {
        self.runs.iter().map(|run| &run.picture)
    }

    /// The judged prompts, with their steps, guidance and size.
    #[must_use]
    pub fn set(&self) -> &PromptSet {
        &self.set
    }

    /// Number of calls for the UNet's error.
    #[must_use]
    pub fn held_out(&self) -> usize {
        self.held_out.len()
    }

    /// Error of each stage's output, with all earlier stages compressed too: ‖new - dense‖² /
    /// ‖dense‖² of the hidden states, over the held-out calls.
    ///
    /// # Errors
    /// If a stage cannot be loaded or run.
    pub fn stage_errors(
        &self,
        chain: &UnetChain,
        dense: &dyn TensorSource,
        new: &dyn TensorSource,
    ) -> Result<Vec<(StageName, f64)>> {
        let start = |source: &dyn TensorSource| -> Result<Vec<Carry>> {
            let input_block = chain.load_input_block(source)?;
            let carries = self.held_out.iter();
            carries
                .map(|HeldOut { call, .. }| input_block.forward(&call.sample, call.timestep, &call.conditioning, &mut Unobserved))
                .collect()
        };
        let (mut dense_carries, mut new_carries) = (start(dense)?, start(new)?);
        let mut errors = Vec::new();
        for spec in chain.stages() {
            let (dense_stage, new_stage) = (spec.load(dense)?, spec.load(new)?);
            let (mut off, mut all) = (0.0, 0.0);
            for (dense_carry, new_carry) in dense_carries.iter_mut().zip(&mut new_carries) {
                *dense_carry = dense_stage.forward_in_range(dense_carry.shallow_clone())?;
                *new_carry = new_stage.forward_in_range(new_carry.shallow_clone())?;
                off += squares(&new_carry.hidden_states.f_sub(&dense_carry.hidden_states)?)?;
                all += squares(&dense_carry.hidden_states)?;
            }
            errors.push((spec.name(), off / all));
        }
        Ok(errors)
    }

    /// Measures another UNet on the held-out calls, and step by step from the noise of the dense
    /// runs.
    ///
    /// # Errors
    /// If the UNet cannot run.
    pub fn measure(&self, folder: &PipelineFolder, unet: &dyn Predictor, progress: &dyn Progress) -> Result<Measured> {
        let (mut off, mut all) = (0.0, 0.0);
        {
            let task = Task::begin(progress, "held-out calls", "calls", self.held_out.len());
            for HeldOut { call, output } in &self.held_out {
                task.advance(&format!("timestep {:.0}", call.timestep));
                let new = unet.predict(&call.sample, call.timestep, &call.conditioning)?;
                off += squares(&new.f_sub(output)?)?;
                all += squares(output)?;
            }
        }
        let task = Task::begin(progress, "pictures", "prompts", self.runs.len());
        let mut by_step = Vec::new();
        let mut pictures = Vec::new();
        for (run, prompt) in self.runs.iter().zip(&self.set.prompts) {
            task.advance(prompt);
            let latents = self.latents(folder, unet, &run.guidance, run.seed)?;
            by_step.resize(latents.len(), 0.0);
            for (sum, (new, dense)) in by_step.iter_mut().zip(latents.iter().zip(&run.latents)) {
                *sum += squares(&new.f_sub(dense)?)? / squares(dense)?;
            }
            pictures.push(self.picture(latents.last())?);
        }
        let runs = self.runs.len() as f64;
        Ok(Measured {
            unet_error: off / all,
            latent_error_by_step: by_step.into_iter().map(|sum| sum / runs).collect(),
            pictures,
        })
    }
}

/// Sum of squares, in fp64 where the device has it.
fn squares(tensor: &Tensor) -> Result<f64> {
    sum::squares(&tensor.f_to_kind(sum_kind(tensor.device()))?)
}

/// A UNet that keeps some of its calls with their outputs.
struct Watcher<'a, 'b> {
    unet: &'a Unet<'b>,
    steps: Vec<usize>,
    calls: RefCell<(usize, Vec<HeldOut>)>,
}

impl Predictor for Watcher<'_, '_> {
    fn predict(&self, sample: &Tensor, timestep: f64, conditioning: &Conditioning) -> Result<Tensor> {
        let output = self.unet.predict(sample, timestep, conditioning)?;
        let (step, calls) = &mut *self.calls.borrow_mut();
        if self.steps.contains(step) {
            let call = Sample { sample: sample.shallow_clone(), timestep, conditioning: conditioning.shallow_clone() };
            calls.push(HeldOut { call, output: output.shallow_clone() });
        }
        *step += 1;
        Ok(output)
    }
}
