//! Ancestral sampling with Euler's method: each step goes below the next noise level, and fresh
//! noise leads back up to it.

use squeeze_base::error::Result;
use squeeze_numerics::random::Generator;
use tch::{Kind, Tensor};

use super::exploding::Exploding;
use super::noise::{NoiseSchedule, sigmas};
use super::predicted::denoised;
use super::sigmas::sigma_at;
use super::spacing::{Spacing, SpacingKind};
use super::{Prediction, Scheduler, noise_like, over, scalar, single, sqrt};
use crate::checkpoint::ConfigFile;

/// diffusers' `EulerAncestralDiscreteScheduler`.
#[derive(Debug)]
pub(super) struct EulerAncestral {
    levels: Exploding,
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
        Ok(EulerAncestral { levels: Exploding::new(timesteps, sigmas, spacing.kind)?, prediction })
    }
}

impl Scheduler for EulerAncestral {
    fn timesteps(&self) -> &[f64] {
        &self.levels.timesteps
    }

    fn init_noise_sigma(&self) -> f64 {
        f64::from(self.levels.init_noise_sigma)
    }

    fn scale_model_input(&self, sample: &Tensor, index: usize) -> Result<Tensor> {
        self.levels.scaled(sample, index)
    }

    fn step(&mut self, index: usize, model_output: &Tensor, sample: &Tensor, generator: &mut Generator) -> Result<Tensor> {
        let (from, to) = self.levels.sigmas_at(index)?;
        let sample = sample.f_to_kind(Kind::Float)?;
        let denoised = denoised(self.prediction, from, model_output, &sample)?;
        let up = sqrt(to * to * (from * from - to * to) / (from * from))?;
        let down = sqrt(to * to - up * up)?;
        let derivative = over(&sample.f_sub(&denoised)?, from)?;
        let below = sample.f_add(&derivative.f_mul(&scalar(down - from)?)?)?;
        let noise = noise_like(model_output, model_output.f_kind()?, generator)?;
        Ok(below.f_add(&noise.f_mul(&scalar(up)?)?)?.f_to_kind(model_output.f_kind()?)?)
    }

    fn add_noise(&self, index: usize, picture: &Tensor, noise: &Tensor) -> Result<Tensor> {
        self.levels.noisy(index, picture, noise)
    }
}
