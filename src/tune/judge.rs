//! The held-out prompts: how far a network's own pictures end from those of the dense one.
//!
//! The error of single predictions is a poor guide: it can fall while pictures move away, because
//! most errors are corrected on the way and few are not. So whole pictures are drawn.

use sdxl_model::scheduler::SchedulerConfig;
use sdxl_model::unet::{Conditioning, UnetChain};
use sdxl_pipeline::{Denoised, Guidance};
use squeeze_base::error::{Error, Result};
use squeeze_numerics::random::Generator;
use squeeze_numerics::sum;
use tch::{Kind, Tensor};

use super::backward::predict;
use super::parameters::Parameters;
use crate::calibration::Sample;

/// A picture to draw.
#[derive(Debug)]
pub struct Probe {
    /// Its prompt.
    pub guidance: Guidance,
    /// Seed of its noise.
    pub seed: u64,
}

/// How pictures are drawn.
#[derive(Debug, Clone, Copy)]
pub struct Drawing<'a> {
    /// The sampler.
    pub scheduler: &'a SchedulerConfig,
    /// Its steps.
    pub steps: usize,
    /// The shape of the latents: [1, c, h, w].
    pub shape: [i64; 4],
    /// Calls of the UNet that run together.
    pub joined: usize,
}

/// The predictions of a network for some calls at one timestep: the inputs, and the conditioning of
/// each.
pub type Predict<'a> = &'a dyn Fn(&[Tensor], f64, &[&Conditioning]) -> Result<Vec<Tensor>>;

impl Drawing<'_> {
    /// The final latents [1, c, h, w] of `probes`, drawn by `predict`. `on_call` is called before
    /// each call of the UNet.
    ///
    /// # Errors
    /// If the sampler or `predict` fails.
    pub fn latents(&self, probes: &[Probe], predict: Predict<'_>, on_call: &dyn Fn(f64) -> Result<()>) -> Result<Vec<Tensor>> {
        let mut all = Vec::with_capacity(probes.len());
        for probes in probes.chunks(self.joined.max(1)) {
            let mut samplers = probes.iter().map(|_| self.scheduler.scheduler(self.steps)).collect::<Result<Vec<_>>>()?;
            let mut generators: Vec<Generator> = probes.iter().map(|probe| Generator::new(probe.seed)).collect();
            let mut pictures = Vec::with_capacity(probes.len());
            for ((probe, sampler), generator) in probes.iter().zip(&mut samplers).zip(&mut generators) {
                let like = &probe.guidance.conditioning.encoder_hidden_states;
                let noise = generator.draw(&self.shape, like.f_kind()?)?.f_to_device(like.device())?;
                pictures.push(Denoised::from_noise(sampler.as_mut(), &probe.guidance, &noise, generator)?);
            }
            let timesteps = pictures.first().map_or_else(Vec::new, |picture| picture.timesteps().to_vec());
            let conditionings: Vec<&Conditioning> = probes.iter().map(|probe| &probe.guidance.conditioning).collect();
            for (call, timestep) in timesteps.into_iter().enumerate() {
                on_call(timestep)?;
                let inputs = pictures.iter().map(|picture| picture.input(call)).collect::<Result<Vec<_>>>()?;
                for (picture, prediction) in pictures.iter_mut().zip(predict(&inputs, timestep, &conditionings)?) {
                    picture.step(call, &prediction)?;
                }
            }
            all.extend(pictures.iter().map(|picture| picture.latents().shallow_clone()));
        }
        Ok(all)
    }
}

/// The held-out pictures, with the final latents of the dense network.
#[derive(Debug)]
pub struct Judge<'a> {
    /// How they are drawn.
    pub drawing: Drawing<'a>,
    /// The pictures; at least one.
    pub probes: Vec<Probe>,
    /// The dense network's final latents.
    pub dense: Vec<Tensor>,
}

impl Judge<'_> {
    /// ‖x - x'‖² / ‖x'‖² of the final latents, over all pictures; infinite if the network's latents
    /// are not finite.
    ///
    /// # Errors
    /// If libtorch refuses, usually for want of memory.
    pub(super) fn error(
        &self,
        chain: &UnetChain,
        parameters: &Parameters<'_>,
        on_call: &dyn Fn(f64) -> Result<()>,
    ) -> Result<f64> {
        let placement = parameters.placement();
        let together = |inputs: &[Tensor], timestep: f64, conditionings: &[&Conditioning]| -> Result<Vec<Tensor>> {
            let call = |(input, conditioning): (&Tensor, &&Conditioning)| {
                let call = Sample { sample: input.shallow_clone(), timestep, conditioning: conditioning.shallow_clone() };
                call.placed(placement)
            };
            let calls = inputs.iter().zip(conditionings).map(call).collect::<Result<Vec<_>>>()?;
            let prediction = predict(chain, parameters, &calls.iter().collect::<Vec<_>>())?;
            let rows = prediction.size4()?.0 / inputs.len() as i64;
            (0..inputs.len() as i64).map(|call| Ok(prediction.f_narrow(0, call * rows, rows)?)).collect()
        };
        let latents = match self.drawing.latents(&self.probes, &together, on_call) {
            Ok(latents) => latents,
            // A state that draws no picture at all is worse than any other.
            Err(Error::NotFinite(_)) => return Ok(f64::INFINITY),
            Err(error) => return Err(error),
        };
        let (mut off, mut all) = (0.0, 0.0);
        for (latents, dense) in latents.iter().zip(&self.dense) {
            let dense = dense.f_to_device(latents.device())?;
            off += squared_difference(latents, &dense)?;
            all += sum::squares(&dense.f_to_kind(Kind::Float)?)?;
        }
        Ok(off / all)
    }
}

/// ‖a - b‖².
pub(super) fn squared_difference(one: &Tensor, other: &Tensor) -> Result<f64> {
    sum::squares(&one.f_to_kind(Kind::Float)?.f_sub(&other.f_to_kind(Kind::Float)?)?)
}
