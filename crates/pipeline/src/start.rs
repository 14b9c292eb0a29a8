//! The latents and the step with which a run begins.

use sdxl_model::scheduler::Scheduler;
use squeeze_base::error::{Error, Result};
use tch::Tensor;

/// The latents and the step with which a run begins.
#[derive(Debug)]
pub struct Start {
    /// Noisy latents [1, c, h, w].
    pub(crate) latents: Tensor,
    /// The index of the first step.
    pub(crate) first: usize,
    /// The picture that is kept outside of a mask, by a UNet that is not told of it.
    pub(crate) kept: Option<Kept>,
}

/// A picture that is put back, with its noise, outside of a mask after each step.
#[derive(Debug)]
pub(crate) struct Kept {
    /// Scaled latents [1, c, h, w].
    pub picture: Tensor,
    /// Unit noise [1, c, h, w].
    pub noise: Tensor,
    /// 1 where the picture is drawn anew, else 0: [1, 1, h, w].
    pub mask: Tensor,
}

impl Start {
    /// Starts from unit `noise` [1, c, h, w] and runs every step.
    ///
    /// # Errors
    /// If libtorch refuses an operation.
    pub fn noise(scheduler: &dyn Scheduler, noise: &Tensor) -> Result<Self> {
        Ok(Start { latents: noise.f_mul_scalar(scheduler.init_noise_sigma())?, first: 0, kept: None })
    }

    /// Starts from scaled latents of a picture under unit `noise`, both [1, c, h, w], and leaves
    /// out the first `skipped` of the sampler's steps.
    ///
    /// # Errors
    /// If there is no such step.
    pub fn picture(scheduler: &mut dyn Scheduler, skipped: usize, picture: &Tensor, noise: &Tensor) -> Result<Self> {
        let first = scheduler.first_call(skipped);
        scheduler.begin_at(first)?;
        Ok(Start { latents: scheduler.add_noise(first, picture, noise)?, first, kept: None })
    }
}

impl Kept {
    /// Puts the picture back outside of the mask, into the `latents` after the step before `next`.
    pub(crate) fn put_back(&self, scheduler: &dyn Scheduler, next: usize, latents: &Tensor) -> Result<Tensor> {
        let picture = match next < scheduler.timesteps().len() {
            true => scheduler.add_noise(next, &self.picture, &self.noise)?,
            false => self.picture.shallow_clone(),
        };
        let outside = self.mask.f_neg()?.f_add_scalar(1.0)?;
        Ok(outside.f_mul(&picture)?.f_add(&self.mask.f_mul(latents)?)?)
    }
}

/// The first of `steps` steps for a share `strength` of them, as in diffusers' `get_timesteps`.
///
/// # Errors
/// [`Error::Argument`] if the strength is not between 0 and 1, or leaves no step.
pub(crate) fn first_step(steps: usize, strength: f64) -> Result<usize> {
    if !(0.0..=1.0).contains(&strength) {
        return Err(Error::Argument(format!("a strength of {strength} is not between 0 and 1")));
    }
    match (steps as f64 * strength) as usize {
        0 => Err(Error::Argument(format!("a strength of {strength} leaves none of {steps} steps"))),
        taken => Ok(steps - taken.min(steps)),
    }
}
