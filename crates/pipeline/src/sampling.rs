//! The denoising loop.

use sdxl_model::Unobserved;
use sdxl_model::scheduler::Scheduler;
use sdxl_model::unet::{Conditioning, Unet};
use squeeze_base::error::{Error, Result};
use squeeze_base::progress::{Progress, Task};
use squeeze_numerics::finite::is_finite;
use squeeze_numerics::random::Generator;
use tch::Tensor;

use super::prompt::Guidance;
use super::start::Start;

/// A UNet, or a wrapper that observes one.
pub trait Predictor {
    /// The prediction for noisy latents `sample` [b, c, h, w] at `timestep`.
    ///
    /// # Errors
    /// If it cannot be computed.
    fn predict(&self, sample: &Tensor, timestep: f64, conditioning: &Conditioning) -> Result<Tensor>;
}

impl Predictor for Unet<'_> {
    fn predict(&self, sample: &Tensor, timestep: f64, conditioning: &Conditioning) -> Result<Tensor> {
        self.forward(sample, timestep, conditioning, &mut Unobserved)
    }
}

/// Denoises `noise` [1, c, h, w] through every timestep of `scheduler` to the final latents [1, c,
/// h, w].
///
/// As in diffusers, both halves of guidance are one batch, and the scheduler steps the guided
/// prediction. Stochastic samplers draw from `generator`, which should have drawn `noise`.
/// `on_step` is called with the latents after each step of the scheduler.
///
/// # Errors
/// If the UNet cannot run, `on_step` fails, or the latents become NaN or infinite.
pub fn sample(
    unet: &dyn Predictor,
    scheduler: &mut dyn Scheduler,
    guidance: &Guidance,
    noise: &Tensor,
    generator: &mut Generator,
    on_step: &mut dyn FnMut(usize, &Tensor) -> Result<()>,
    progress: &dyn Progress,
) -> Result<Tensor> {
    let start = Start::noise(scheduler, noise)?;
    sample_from(unet, scheduler, guidance, &start, generator, on_step, progress)
}

/// Denoises the latents of `start` [1, c, h, w] through the timesteps of `scheduler` from its first
/// step on, else as [`sample`] does.
///
/// # Errors
/// As [`sample`].
pub fn sample_from(
    unet: &dyn Predictor,
    scheduler: &mut dyn Scheduler,
    guidance: &Guidance,
    start: &Start,
    generator: &mut Generator,
    on_step: &mut dyn FnMut(usize, &Tensor) -> Result<()>,
    progress: &dyn Progress,
) -> Result<Tensor> {
    let kind = start.latents.f_kind()?;
    let timesteps = scheduler.timesteps().to_vec();
    let task = Task::begin(progress, "denoising", "steps", timesteps.len().saturating_sub(start.first));
    let mut latents = start.latents.shallow_clone();
    let rows = guidance.rows()?;
    for (index, timestep) in timesteps.into_iter().enumerate().skip(start.first) {
        task.advance(&format!("timestep {timestep:.0}"));
        let mut input = scheduler.scale_model_input(&latents.f_repeat([rows, 1, 1, 1])?, index)?;
        if let Some(image) = &guidance.image {
            input = Tensor::f_cat(&[&input, image], 1)?;
        }
        let prediction = unet.predict(&input, timestep, &guidance.conditioning)?;
        let guided = match (guidance.scale, guidance.image_scale) {
            (None, _) => prediction,
            (Some(scale), Some(image_scale)) => guided_twice(&prediction, scale, image_scale)?,
            (Some(scale), None) => {
                let (negative, positive) = (prediction.f_narrow(0, 0, 1)?, prediction.f_narrow(0, 1, 1)?);
                let guided = negative.f_add(&positive.f_sub(&negative)?.f_mul_scalar(scale)?)?;
                rescaled(guided, &positive, guidance.rescale)?
            }
        };
        latents = scheduler.step(index, &guided, &latents, generator)?.f_to_kind(kind)?;
        if let Some(kept) = &start.kept {
            latents = kept.put_back(scheduler, index + 1, &latents)?;
        }
        if !is_finite(&latents)? {
            let hint = if kind == tch::Kind::Half { " (fp16 overflows in some models; try --dtype bf16 or f32)" } else { "" };
            return Err(Error::NotFinite(format!("the latents became NaN or infinite at timestep {timestep:.0}{hint}")));
        }
        on_step(index, &latents)?;
    }
    Ok(latents)
}

/// The guided prediction with a share of it brought to the deviation of the prompt's own, against
/// overexposure (section 3.4 of Lin et al. 2023, arXiv:2305.08891; diffusers' `rescale_noise_cfg`).
fn rescaled(guided: Tensor, positive: &Tensor, share: f64) -> Result<Tensor> {
    if share == 0.0 {
        return Ok(guided);
    }
    let deviation = |tensor: &Tensor| tensor.f_std_dim(&[1_i64, 2, 3][..], true, true);
    let alike = guided.f_mul(&deviation(positive)?.f_div(&deviation(&guided)?)?)?;
    Ok(alike.f_mul_scalar(share)?.f_add(&guided.f_mul_scalar(1.0 - share)?)?)
}

/// The guided prediction of an edit model [1, c, h, w], from those for the prompt and the picture,
/// the picture alone, and neither [3, c, h, w] (equation 3 of Brooks et al. 2023, InstructPix2Pix).
fn guided_twice(prediction: &Tensor, scale: f64, image_scale: f64) -> Result<Tensor> {
    let row = |index| prediction.f_narrow(0, index, 1);
    let (text, image, neither) = (row(0)?, row(1)?, row(2)?);
    let of_text = text.f_sub(&image)?.f_mul_scalar(scale)?;
    let of_image = image.f_sub(&neither)?.f_mul_scalar(image_scale)?;
    Ok(neither.f_add(&of_text)?.f_add(&of_image)?)
}
