//! Denoising diffusion implicit models (Song et al. 2021, arXiv:2010.02502), deterministic (η = 0).

use serde_json::json;
use squeeze_base::error::{Error, Result};
use tch::Tensor;

use super::noise::NoiseSchedule;
use super::spacing::{Spacing, SpacingKind};
use super::{Prediction, Scheduler, check_index, over, sqrt, times};
use crate::checkpoint::ConfigFile;

/// diffusers' `DDIMScheduler`.
#[derive(Debug)]
pub(super) struct Ddim {
    timesteps: Vec<f64>,
    /// ᾱ before and after each step.
    signal: Vec<(f32, f32)>,
    /// The bound on the magnitude of the predicted picture's values, if there is one.
    clip: Option<f64>,
    prediction: Prediction,
}

impl Ddim {
    pub(super) fn new(file: &mut ConfigFile, noise: &NoiseSchedule, steps: usize) -> Result<Self> {
        let prediction = file.or("prediction_type", Prediction::Epsilon)?;
        let spacing = Spacing::read(file, SpacingKind::Leading)?;
        let clips: bool = file.or("clip_sample", true)?;
        let range: f64 = file.or("clip_sample_range", 1.0)?;
        if clips && range <= 0.0 {
            return Err(file.error("clip_sample_range", format!("= {range} is not above 0")));
        }
        let ends_at_one: bool = file.or("set_alpha_to_one", true)?;
        file.only("thresholding", &[json!(false)])?;

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
            if prediction == Prediction::Epsilon && table[index] <= 0.0 && !clips {
                let problem = "= epsilon cannot be sampled from a timestep that is pure noise (rescale_betas_zero_snr)";
                return Err(file.error("prediction_type", problem));
            }
            signal.push((table[index], after));
        }
        Ok(Ddim { timesteps, signal, clip: clips.then_some(range), prediction })
    }
}

impl Scheduler for Ddim {
    fn timesteps(&self) -> &[f64] {
        &self.timesteps
    }

    fn step(&mut self, index: usize, model_output: &Tensor, sample: &Tensor) -> Result<Tensor> {
        check_index(index, &self.timesteps)?;
        let (before, after) = self.signal[index];
        let (signal, noise) = (sqrt(before)?, sqrt(1.0 - before)?);
        let (picture, epsilon) = match self.prediction {
            Prediction::Epsilon => (over(&sample.f_sub(&times(noise, model_output)?)?, signal)?, model_output.shallow_clone()),
            Prediction::Sample => (model_output.shallow_clone(), over(&sample.f_sub(&times(signal, model_output)?)?, noise)?),
            Prediction::Velocity => (
                times(signal, sample)?.f_sub(&times(noise, model_output)?)?,
                times(signal, model_output)?.f_add(&times(noise, sample)?)?,
            ),
        };
        // As in diffusers by default, epsilon is not recomputed from the clipped picture.
        let picture = match self.clip {
            Some(range) => picture.f_clamp(-range, range)?,
            None => picture,
        };
        Ok(times(sqrt(after)?, &picture)?.f_add(&times(sqrt(1.0 - after)?, &epsilon)?)?)
    }

    fn add_noise(&self, index: usize, picture: &Tensor, noise: &Tensor) -> Result<Tensor> {
        check_index(index, &self.timesteps)?;
        let (before, _) = self.signal[index];
        Ok(times(sqrt(before)?, picture)?.f_add(&times(sqrt(1.0 - before)?, noise)?)?)
    }
}
