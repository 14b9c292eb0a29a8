//! Multistep consistency sampling of latent consistency models (Luo et al. 2023, arXiv:2310.04378).

use squeeze_base::error::Result;
use squeeze_numerics::random::Generator;
use tch::Tensor;

use super::clip::Clip;
use super::distilled::Distilled;
use super::noise::NoiseSchedule;
use super::predicted::picture_and_noise;
use super::{Scheduler, check_index, mixed, noise_like, sqrt, times};
use crate::checkpoint::ConfigFile;

/// diffusers' `LCMScheduler`.
#[derive(Debug)]
pub(super) struct Lcm {
    steps: Distilled,
    clip: Clip,
    timestep_scaling: f64,
}

impl Lcm {
    pub(super) fn new(file: &mut ConfigFile, noise: &NoiseSchedule, steps: usize) -> Result<Self> {
        let timestep_scaling = file.or("timestep_scaling", 10.0)?;
        let clip = Clip::read(file, false)?;
        Ok(Lcm { steps: Distilled::read(file, noise, steps, clip.is_on())?, clip, timestep_scaling })
    }
}

impl Scheduler for Lcm {
    fn timesteps(&self) -> &[f64] {
        &self.steps.timesteps
    }

    fn step(&mut self, index: usize, model_output: &Tensor, sample: &Tensor, generator: &mut Generator) -> Result<Tensor> {
        check_index(index, self.timesteps())?;
        let steps = &self.steps;
        let (picture, _) = picture_and_noise(steps.prediction, steps.signal(index), model_output, sample)?;
        let picture = self.clip.apply(picture)?;
        // The boundary conditions of a consistency function, with σ_data = 0.5.
        let scaled = steps.timesteps[index] as f32 * self.timestep_scaling as f32;
        let total = scaled * scaled + 0.25;
        let denoised = times(scaled / sqrt(total)?, &picture)?.f_add(&times(0.25 / total, sample)?)?;
        if steps.is_last(index) {
            return Ok(denoised);
        }
        let next = steps.signal(index + 1);
        let noise = noise_like(&denoised, denoised.f_kind()?, generator)?;
        Ok(times(sqrt(next)?, &denoised)?.f_add(&times(sqrt(1.0 - next)?, &noise)?)?)
    }

    fn add_noise(&self, index: usize, picture: &Tensor, noise: &Tensor) -> Result<Tensor> {
        check_index(index, self.timesteps())?;
        mixed(self.steps.signal(index), picture, noise)
    }
}
