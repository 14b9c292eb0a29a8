//! Trajectory consistency distillation (Zheng et al. 2024, arXiv:2402.19159, algorithm 4).

use squeeze_base::error::Result;
use squeeze_numerics::random::Generator;
use tch::Tensor;

use super::distilled::Distilled;
use super::noise::NoiseSchedule;
use super::predicted::picture_and_noise;
use super::{Scheduler, check_index, mixed, noise_like, sqrt, times};
use crate::checkpoint::ConfigFile;

/// diffusers' `TCDScheduler`.
#[derive(Debug)]
pub(super) struct Tcd {
    steps: Distilled,
    /// The share of the way to the clean end that is jumped and then made noisy again: γ in the
    /// paper.
    eta: f64,
}

impl Tcd {
    pub(super) fn new(file: &mut ConfigFile, noise: &NoiseSchedule, steps: usize, eta: f64) -> Result<Self> {
        // The class has these keys, but in diffusers they change nothing.
        for key in ["clip_sample", "thresholding"] {
            if file.or(key, false)? {
                tracing::warn!("{}: `{key}` = true has no effect on TCD, in diffusers neither", file.path().display());
            }
        }
        file.ignore(&["timestep_scaling", "clip_sample_range"]);
        Ok(Tcd { steps: Distilled::read(file, noise, steps, false)?, eta })
    }
}

impl Scheduler for Tcd {
    fn timesteps(&self) -> &[f64] {
        &self.steps.timesteps
    }

    fn step(&mut self, index: usize, model_output: &Tensor, sample: &Tensor, generator: &mut Generator) -> Result<Tensor> {
        check_index(index, self.timesteps())?;
        let steps = &self.steps;
        let last = steps.is_last(index);
        let next = if last { 0.0 } else { steps.timesteps[index + 1] };
        // The less noisy timestep to which the model jumps, before noise leads up to `next`.
        let below = ((1.0 - self.eta) as f32 * next as f32).floor() as usize;
        let target = steps.table[below];
        let (picture, epsilon) = picture_and_noise(steps.prediction, steps.signal(index), model_output, sample)?;
        let jumped = times(sqrt(target)?, &picture)?.f_add(&times(sqrt(1.0 - target)?, &epsilon)?)?;
        if last || self.eta == 0.0 {
            return Ok(jumped);
        }
        let share = steps.table[next as usize] / target;
        let noise = noise_like(model_output, jumped.f_kind()?, generator)?;
        Ok(times(sqrt(share)?, &jumped)?.f_add(&times(sqrt(1.0 - share)?, &noise)?)?)
    }

    fn add_noise(&self, index: usize, picture: &Tensor, noise: &Tensor) -> Result<Tensor> {
        check_index(index, self.timesteps())?;
        mixed(self.steps.signal(index), picture, noise)
    }
}
