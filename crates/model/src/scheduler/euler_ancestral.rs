//! Ancestral sampling with Euler's method: each step goes below the next noise level, and fresh
//! noise leads back up to it.

use squeeze_base::error::Result;
use squeeze_numerics::random::Generator;
use tch::{Kind, Tensor};

use super::noise::{NoiseSchedule, sigmas};
use super::predicted::denoised;
use super::sigmas::{first_factor, sigma_at};
use super::spacing::{Spacing, SpacingKind};
use super::{Prediction, Scheduler, check_index, noise_like, over, scalar, single, sqrt};
use crate::checkpoint::ConfigFile;

/// diffusers' `EulerAncestralDiscreteScheduler`.
#[derive(Debug)]
pub(super) struct EulerAncestral {
    timesteps: Vec<f64>,
    /// The noise before each step and after the last, relative to the picture.
    sigmas: Vec<f32>,
    init_noise_sigma: f32,
    prediction: Prediction,
}

impl EulerAncestral {
    pub(super) fn new(file: &mut ConfigFile, noise: &NoiseSchedule, steps: usize) -> Result<Self> {
        let prediction = file.or("prediction_type", Prediction::Epsilon)?;
        if prediction == Prediction::Sample {
            return Err(file.error("prediction_type", "= sample is not supported by this class, in diffusers neither"));
        }
        let spacing = Spacing::read(file, SpacingKind::Linspace)?;
        let table = sigmas(&noise.positive_signal(file)?)?;
        let timesteps: Vec<f64> = spacing.timesteps(table.len(), steps).into_iter().map(single).collect();
        let mut sigmas: Vec<f32> = timesteps.iter().map(|timestep| sigma_at(*timestep, &table) as f32).collect();
        sigmas.push(0.0);
        let init_noise_sigma = first_factor(&sigmas, spacing.kind)?;
        Ok(EulerAncestral { timesteps, sigmas, init_noise_sigma, prediction })
    }
}

impl Scheduler for EulerAncestral {
    fn timesteps(&self) -> &[f64] {
        &self.timesteps
    }

    fn init_noise_sigma(&self) -> f64 {
        f64::from(self.init_noise_sigma)
    }

    fn scale_model_input(&self, sample: &Tensor, index: usize) -> Result<Tensor> {
        check_index(index, &self.timesteps)?;
        let sigma = self.sigmas[index];
        over(sample, sqrt(sigma * sigma + 1.0)?)
    }

    fn step(&mut self, index: usize, model_output: &Tensor, sample: &Tensor, generator: &mut Generator) -> Result<Tensor> {
        check_index(index, &self.timesteps)?;
        let (from, to) = (self.sigmas[index], self.sigmas[index + 1]);
        let sample = sample.f_to_kind(Kind::Float)?;
        let denoised = denoised(self.prediction, from, model_output, &sample)?;
        let up = sqrt(to * to * (from * from - to * to) / (from * from))?;
        let down = sqrt(to * to - up * up)?;
        let derivative = over(&sample.f_sub(&denoised)?, from)?;
        let below = sample.f_add(&derivative.f_mul(&scalar(down - from)?)?)?;
        let noise = noise_like(model_output, model_output.f_kind()?, generator)?;
        Ok(below.f_add(&noise.f_mul(&scalar(up)?)?)?.f_to_kind(model_output.f_kind()?)?)
    }
}
