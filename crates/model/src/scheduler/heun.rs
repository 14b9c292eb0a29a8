//! Heun's method in the variance-exploding view of Karras et al. 2022 (arXiv:2206.00364, algorithm
//! 1).
//!
//! Every step but the last calls the model twice: where it starts, and where Euler's method would
//! end. The timesteps list both calls.

use squeeze_base::error::{Error, Result};
use squeeze_numerics::random::Generator;
use tch::Tensor;

use super::clip::Clip;
use super::exploding::{Exploding, curved};
use super::noise::{NoiseSchedule, sigmas};
use super::predicted::denoised;
use super::sigmas::{SigmaCurve, sigma_at};
use super::spacing::{Spacing, SpacingKind};
use super::{Prediction, Scheduler, over, scalar, single};
use crate::checkpoint::ConfigFile;

/// diffusers' `HeunDiscreteScheduler`.
#[derive(Debug)]
pub(super) struct Heun {
    levels: Exploding,
    prediction: Prediction,
    clip: Clip,
    /// The sample before a step and its derivative, between the step's two calls.
    half: Option<(Tensor, Tensor)>,
}

impl Heun {
    pub(super) fn new(file: &mut ConfigFile, noise: &NoiseSchedule, steps: usize) -> Result<Self> {
        let prediction = file.or("prediction_type", Prediction::Epsilon)?;
        let spacing = Spacing::read(file, SpacingKind::Linspace)?;
        let curve = SigmaCurve::read(file)?;
        let clip = Clip::read_without_thresholding(file, false)?;
        let table = sigmas(&noise.positive_signal(file)?)?;
        let mut timesteps: Vec<f64> = spacing.timesteps(table.len(), steps).into_iter().map(single).collect();
        let mut sigmas: Vec<f64> = timesteps.iter().map(|timestep| sigma_at(*timestep, &table)).collect();
        if let Some(curved) = curved(&curve, &sigmas, &table, steps) {
            (timesteps, sigmas) = curved;
        }
        let twice = |values: &[f64]| -> Vec<f64> {
            values.iter().enumerate().flat_map(|(i, value)| vec![*value; if i == 0 { 1 } else { 2 }]).collect()
        };
        let timesteps = twice(&timesteps);
        let mut sigmas: Vec<f32> = twice(&sigmas).into_iter().map(|sigma| sigma as f32).collect();
        sigmas.push(0.0);
        Ok(Heun { levels: Exploding::new(timesteps, sigmas, spacing.kind)?, prediction, clip, half: None })
    }
}

impl Scheduler for Heun {
    fn timesteps(&self) -> &[f64] {
        &self.levels.timesteps
    }

    fn init_noise_sigma(&self) -> f64 {
        f64::from(self.levels.init_noise_sigma)
    }

    fn scale_model_input(&self, sample: &Tensor, index: usize) -> Result<Tensor> {
        self.levels.scaled(sample, index)
    }

    fn step(&mut self, index: usize, model_output: &Tensor, sample: &Tensor, _: &mut Generator) -> Result<Tensor> {
        let (sigma, next_sigma) = self.levels.sigmas_at(index)?;
        // Even calls start a step; odd ones are where Euler's method ended.
        let half = self.half.take().filter(|_| index % 2 == 1);
        if index % 2 == 1 && half.is_none() {
            return Err(Error::Argument(format!("step {index} out of order: it continues step {}", index - 1)));
        }
        let picture = self.clip.apply(denoised(self.prediction, sigma, model_output, sample)?)?;
        let derivative = over(&sample.f_sub(&picture)?, sigma)?;
        match half {
            None => {
                let change = scalar(next_sigma - sigma)?;
                let next = sample.f_add(&derivative.f_mul(&change)?)?;
                self.half = Some((sample.shallow_clone(), derivative));
                Ok(next)
            }
            Some((start, first)) => {
                let mean = first.f_add(&derivative)?.f_div_scalar(2.0)?;
                Ok(start.f_add(&mean.f_mul(&scalar(sigma - self.levels.sigmas[index - 1])?)?)?)
            }
        }
    }

    fn add_noise(&self, index: usize, picture: &Tensor, noise: &Tensor) -> Result<Tensor> {
        self.levels.noisy(index, picture, noise)
    }

    fn first_call(&self, step: usize) -> usize {
        2 * step
    }
}
