//! The judge: how close a compressed UNet stays to the dense one, on prompts outside of the
//! calibration.

use std::cell::RefCell;
use std::ops::Range;

use sdxl_model::Unobserved;
use sdxl_model::checkpoint::{TensorSource, Weights};
use sdxl_model::unet::{Carry, Conditioning, Unet};
use sdxl_model::vae::VaeDecoder;
use sdxl_pipeline::picture::Picture;
use sdxl_pipeline::{Guidance, ImageChannels, NetworkWeights, PipelineFolder, Predictor, decode_with, decoder, sample};
use squeeze_base::error::{Error, Result};
use squeeze_base::progress::{Progress, Silent, Task};
use squeeze_numerics::device::Placement;
use squeeze_numerics::random::Generator;
use squeeze_numerics::sum::{self, sum_kind};
use tch::{Kind, Tensor};

use super::judging::Judging;
use super::pairs::{self, Pair};
use super::results::{Measured, ModelResults, Share};
use crate::calibration::{PicturesInTurn, Sample};
use crate::report::metrics::{psnr, ssim};

/// What is judged, and how.
pub(super) struct Judge<'a> {
    folder: &'a PipelineFolder,
    judging: &'a Judging,
    placement: Placement,
    pairs: Vec<Pair>,
    /// The calls of each pair's dense run that are kept.
    kept: Vec<Vec<usize>>,
    /// The weights of the VAE, which is loaded when pictures are decoded.
    vae: NetworkWeights,
}

/// The dense model's runs of some of the pairs: the reference of every measurement.
pub(super) struct Reference<'a> {
    judge: &'a Judge<'a>,
    range: Range<usize>,
    runs: Vec<Run>,
    held_out: Vec<HeldOut>,
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
    /// Index of the run.
    run: usize,
    call: Sample,
    output: Tensor,
}

impl<'a> Judge<'a> {
    /// Spreads the held-out calls over all pairs and timesteps. Nothing is computed yet.
    ///
    /// # Errors
    /// [`Error::Argument`] if there are no prompts or no noises, or the sampler cannot be made; if
    /// the VAE is missing or damaged.
    pub(super) fn new(folder: &'a PipelineFolder, judging: &'a Judging, placement: Placement) -> Result<Self> {
        let pairs = pairs::pairs(judging.set.prompts.len(), judging.set.seed, judging.seeds)?;
        // A VAE that cannot be read is found before the hours of a compression.
        let vae = folder.vae_network()?;
        let held_out = judging.held_out.unwrap_or(pairs.len().max(Judging::HELD_OUT));
        let kept = judging.set.spread_over(pairs.len(), held_out)?;
        Ok(Judge { folder, judging, placement, pairs, kept, vae })
    }

    /// All pictures, in their order.
    pub(super) fn pairs(&self) -> &[Pair] {
        &self.pairs
    }

    /// Number of calls for the UNet's error.
    pub(super) fn held_out(&self) -> usize {
        self.kept.iter().map(Vec::len).sum()
    }

    /// The pairs of a part, which can be judged without the others.
    pub(super) fn share(&self, part: usize, parts: usize) -> Range<usize> {
        pairs::share(self.pairs.len(), part, parts, self.step())
    }

    /// Every second picture of a model that is shown pictures is made with the one before.
    fn step(&self) -> usize {
        match self.folder.image_channels() {
            ImageChannels::None => 1,
            ImageChannels::MaskAndPicture | ImageChannels::Picture => 2,
        }
    }

    /// Runs the dense `unet` on the pairs of `range`, a [`share`](Self::share) or a part of one
    /// that begins at an even number.
    ///
    /// # Errors
    /// If the pipeline cannot run.
    pub(super) fn record(&'a self, range: Range<usize>, unet: &Unet, progress: &dyn Progress) -> Result<Reference<'a>> {
        let (folder, set) = (self.folder, &self.judging.set);
        let encoder = set.encoder(folder, self.placement)?;
        let vae = decoder(folder, &self.vae, self.placement)?;
        let mut pictures = PicturesInTurn::load(folder, set.size, self.placement)?;
        let mut reference = Reference { judge: self, range: range.clone(), runs: Vec::new(), held_out: Vec::new(), vae };
        let task = Task::begin(progress, "dense pictures", "prompts", range.len());
        for index in range {
            let Pair { prompt, seed } = self.pairs[index];
            let prompt = &set.prompts[prompt];
            task.advance(prompt);
            let guidance = set.guidance_of(prompt, folder, &encoder)?;
            let guidance = match &pictures {
                Some(pictures) => pictures.show(&guidance, index, seed)?,
                None => guidance,
            };
            let watcher = Watcher { unet, steps: &self.kept[index], calls: RefCell::new((0, Vec::new())) };
            let latents = self.latents(&watcher, &guidance, seed)?;
            let run = reference.runs.len();
            let calls = watcher.calls.into_inner().1.into_iter();
            reference.held_out.extend(calls.map(|(call, output)| HeldOut { run, call, output }));
            if let (Some(pictures), Some(last)) = (&mut pictures, latents.last()) {
                pictures.keep(last)?;
            }
            let picture = picture(&reference.vae, latents.last())?;
            reference.runs.push(Run { guidance, seed, latents, picture });
        }
        Ok(reference)
    }

    /// The latents after each step.
    fn latents(&self, unet: &dyn Predictor, guidance: &Guidance, seed: u64) -> Result<Vec<Tensor>> {
        let (folder, set) = (self.folder, &self.judging.set);
        let mut scheduler = set.scheduler.scheduler(set.steps)?;
        let scale = folder.vae.scale();
        let shape = [1, folder.vae.latent_channels, set.size.0 / scale, set.size.1 / scale];
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

    /// How many of the pictures of `range` the report shows.
    fn shown(&self, range: &Range<usize>) -> usize {
        self.judging.shown.saturating_sub(range.start).min(range.len())
    }
}

fn picture(vae: &VaeDecoder, latents: Option<&Tensor>) -> Result<Picture> {
    let latents = latents.ok_or_else(|| Error::Failed("the sampler took no step".into()))?;
    decode_with(vae, latents)
}

impl Reference<'_> {
    /// The dense model's pictures that the report shows.
    pub(super) fn pictures(&self) -> Vec<Picture> {
        self.runs.iter().take(self.judge.shown(&self.range)).map(|run| run.picture.clone()).collect()
    }

    /// Adds the error of each stage's output to `results`, with all earlier stages compressed too:
    /// ‖new - dense‖² and ‖dense‖² of the hidden states, for each held-out call.
    ///
    /// # Errors
    /// If a stage cannot be loaded or run.
    pub(super) fn add_stages(&self, dense: &dyn TensorSource, new: &dyn TensorSource, results: &mut ModelResults) -> Result<()> {
        let chain = &self.judge.folder.unet;
        let start = |source: &dyn TensorSource| -> Result<Vec<Carry>> {
            let input_block = chain.load_input_block(source)?;
            let carries = self.held_out.iter();
            carries
                .map(|HeldOut { call, .. }| input_block.forward(&call.sample, call.timestep, &call.conditioning, &mut Unobserved))
                .collect()
        };
        let (mut dense_carries, mut new_carries) = (start(dense)?, start(new)?);
        for spec in chain.stages() {
            let (dense_stage, new_stage) = (spec.load(dense)?, spec.load(new)?);
            results.measured.iter_mut().for_each(|measured| measured.stages.push(Vec::new()));
            for ((dense_carry, new_carry), held_out) in dense_carries.iter_mut().zip(&mut new_carries).zip(&self.held_out) {
                *dense_carry = dense_stage.forward_in_range(dense_carry.shallow_clone())?;
                *new_carry = new_stage.forward_in_range(new_carry.shallow_clone())?;
                let share = Share::of(&new_carry.hidden_states, &dense_carry.hidden_states)?;
                if let Some(stage) = results.measured[held_out.run].stages.last_mut() {
                    stage.push(share);
                }
            }
        }
        Ok(())
    }

    /// Measures another UNet on the held-out calls alone.
    ///
    /// # Errors
    /// If the UNet cannot run.
    pub(super) fn measure_calls(&self, unet: &dyn Predictor, progress: &dyn Progress) -> Result<Vec<Measured>> {
        let mut measured: Vec<Measured> = self.runs.iter().map(|_| Measured::default()).collect();
        let task = Task::begin(progress, "held-out calls", "calls", self.held_out.len());
        for HeldOut { run, call, output } in &self.held_out {
            task.advance(&format!("timestep {:.0}", call.timestep));
            let new = unet.predict(&call.sample, call.timestep, &call.conditioning)?;
            measured[*run].calls.push(Share::of(&new, output)?);
        }
        Ok(measured)
    }

    /// Measures another UNet on the held-out calls, and step by step from the noise of the dense
    /// runs.
    ///
    /// # Errors
    /// If the UNet cannot run.
    pub(super) fn measure(&self, unet: &dyn Predictor, progress: &dyn Progress) -> Result<ModelResults> {
        let mut measured = self.measure_calls(unet, progress)?;
        let (judge, shown) = (self.judge, self.judge.shown(&self.range));
        let task = Task::begin(progress, "pictures", "prompts", self.runs.len());
        let mut pictures = Vec::new();
        for (index, (run, measured)) in self.runs.iter().zip(&mut measured).enumerate() {
            task.advance(&judge.judging.set.prompts[judge.pairs[self.range.start + index].prompt]);
            let latents = judge.latents(unet, &run.guidance, run.seed)?;
            for (new, dense) in latents.iter().zip(&run.latents) {
                let share = Share::of(new, dense)?;
                measured.latents.push(share.off / share.all);
            }
            let drawn = picture(&self.vae, latents.last())?;
            measured.psnr = psnr(&run.picture, &drawn)?;
            measured.ssim = ssim(&run.picture, &drawn)?;
            measured.lpips = judge.judging.lpips.as_ref().map(|lpips| lpips.distance(&run.picture, &drawn)).transpose()?;
            if index < shown {
                pictures.push(drawn);
            }
        }
        Ok(ModelResults { measured, notes: Vec::new(), pictures })
    }

    /// Measures the dense UNet in the dtype of [`floor_kind`].
    ///
    /// # Errors
    /// If the UNet cannot be loaded or run.
    pub(super) fn measure_floor(&self, weights: &Weights, progress: &dyn Progress) -> Result<ModelResults> {
        let placement = Placement { kind: floor_kind(self.judge.placement.kind), ..self.judge.placement };
        let unet = Unet::resident(self.judge.folder.unet.clone(), weights.source(placement), progress)?;
        let other = InOtherDtype { unet, placement };
        let results = self.measure(&other, progress)?;
        Ok(ModelResults { notes: other.unet.beyond_half(), pictures: Vec::new(), ..results })
    }
}

impl Share {
    /// ‖new - dense‖² of ‖dense‖².
    fn of(new: &Tensor, dense: &Tensor) -> Result<Self> {
        Ok(Share { off: squares(&new.f_sub(dense)?)?, all: squares(dense)? })
    }
}

/// Sum of squares, in fp64 where the device has it.
fn squares(tensor: &Tensor) -> Result<f64> {
    sum::squares(&tensor.f_to_kind(sum_kind(tensor.device()))?)
}

/// The dtype of the noise floor beside dense runs of dtype `kind`: fp16 beside fp32, else fp32.
pub(super) fn floor_kind(kind: Kind) -> Kind {
    if kind == Kind::Float { Kind::Half } else { Kind::Float }
}

/// A UNet that computes in another dtype than the sampler.
struct InOtherDtype<'a> {
    unet: Unet<'a>,
    placement: Placement,
}

impl Predictor for InOtherDtype<'_> {
    fn predict(&self, sample: &Tensor, timestep: f64, conditioning: &Conditioning) -> Result<Tensor> {
        let call = Sample { sample: sample.shallow_clone(), timestep, conditioning: conditioning.shallow_clone() };
        let Sample { sample: placed, conditioning, .. } = call.placed(self.placement)?;
        Ok(self.unet.predict(&placed, timestep, &conditioning)?.f_to_kind(sample.f_kind()?)?)
    }
}

/// A UNet that keeps some of its calls with their outputs.
struct Watcher<'a, 'b> {
    unet: &'a Unet<'b>,
    steps: &'a [usize],
    calls: RefCell<(usize, Vec<(Sample, Tensor)>)>,
}

impl Predictor for Watcher<'_, '_> {
    fn predict(&self, sample: &Tensor, timestep: f64, conditioning: &Conditioning) -> Result<Tensor> {
        let output = self.unet.predict(sample, timestep, conditioning)?;
        let (step, calls) = &mut *self.calls.borrow_mut();
        if self.steps.contains(step) {
            let call = Sample { sample: sample.shallow_clone(), timestep, conditioning: conditioning.shallow_clone() };
            calls.push((call, output.shallow_clone()));
        }
        *step += 1;
        Ok(output)
    }
}
