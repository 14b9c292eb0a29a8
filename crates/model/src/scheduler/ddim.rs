//! Denoising diffusion implicit models (Song et al. 2021, arXiv:2010.02502), with the noise of η.
//!
//! η is no key of the config: it is 0, and the sampler deterministic, unless the caller asks for
//! more.

use squeeze_base::error::{Error, Result};
use squeeze_numerics::random::Generator;
use tch::Tensor;

use super::clip::Clip;
use super::noise::NoiseSchedule;
use super::predicted::picture_and_noise;
use super::spacing::{Spacing, SpacingKind};
use super::{Prediction, Scheduler, check_index, mixed, noise_like, sqrt, times};
use crate::checkpoint::ConfigFile;

/// diffusers' `DDIMScheduler`.
#[derive(Debug)]
pub(super) struct Ddim {
    timesteps: Vec<f64>,
    /// ᾱ before and after each step.
    signal: Vec<(f32, f32)>,
    clip: Clip,
    prediction: Prediction,
    eta: f64,
}

impl Ddim {
    pub(super) fn new(file: &mut ConfigFile, noise: &NoiseSchedule, steps: usize, eta: f64) -> Result<Self> {
        let prediction = file.or("prediction_type", Prediction::Epsilon)?;
        let spacing = Spacing::read(file, SpacingKind::Leading)?;
        let clip = Clip::read(file, true)?;
        let ends_at_one: bool = file.or("set_alpha_to_one", true)?;

        let table = noise.signal()?;
        let last = if ends_at_one { 1.0 } else { table[0] };
        let stride = table.len() / steps;
        let timesteps: Vec<f64> = spacing.timesteps(table.len(), steps).into_iter().map(f64::round_ties_even).collect();
        let mut signal = Vec::with_capacity(timesteps.len());
        for &timestep in &timesteps {
            let index = timestep as usize;
            if timestep < 0.0 || index >= table.len() {
                return Err(Error::Argument(format!(
                    "{steps} DDIM steps of {} spaced this way reach timestep {timestep}, which does not exist; take one more or less",
                    table.len()
                )));
            }
            // As in diffusers, the step ends one whole stride below, whatever the spacing; this
            // need not be the next timestep.
            let after = if index >= stride { table[index - stride] } else { last };
            if prediction == Prediction::Epsilon && table[index] <= 0.0 && !clip.is_on() {
                let problem = "= epsilon cannot be sampled from a timestep that is pure noise (rescale_betas_zero_snr)";
                return Err(file.error("prediction_type", problem));
            }
            signal.push((table[index], after));
        }
        Ok(Ddim { timesteps, signal, clip, prediction, eta })
    }
}

impl Scheduler for Ddim {
    fn timesteps(&self) -> &[f64] {
        &self.timesteps
    }

    fn step(&mut self, index: usize, model_output: &Tensor, sample: &Tensor, generator: &mut Generator) -> Result<Tensor> {
        check_index(index, &self.timesteps)?;
        let (before, after) = self.signal[index];
        let (picture, epsilon) = picture_and_noise(self.prediction, before, model_output, sample)?;
        // As in diffusers by default, epsilon is not recomputed from the clipped picture.
        let picture = times(sqrt(after)?, &self.clip.apply(picture)?)?;
        if self.eta == 0.0 {
            return Ok(picture.f_add(&times(sqrt(1.0 - after)?, &epsilon)?)?);
        }
        let variance = (1.0 - after) / (1.0 - before) * (1.0 - before / after);
        let deviation = self.eta as f32 * sqrt(variance)?;
        let next = picture.f_add(&times(sqrt(1.0 - after - deviation * deviation)?, &epsilon)?)?;
        let noise = noise_like(model_output, model_output.f_kind()?, generator)?;
        Ok(next.f_add(&times(deviation, &noise)?)?)
    }

    fn add_noise(&self, index: usize, picture: &Tensor, noise: &Tensor) -> Result<Tensor> {
        check_index(index, &self.timesteps)?;
        mixed(self.signal[index].0, picture, noise)
    }
}
