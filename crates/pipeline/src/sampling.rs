//! The denoising loop.

use sdxl_model::scheduler::Scheduler;
use sdxl_model::unet::{Conditioning, Unet};
use squeeze_base::error::{Error, Result};
use squeeze_base::progress::{Progress, Task};
use squeeze_numerics::finite::is_finite;
use squeeze_numerics::random::Generator;
use tch::Tensor;

use super::prompt::Guidance;
use super::start::{Kept, Start};

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
        Unet::predict(self, sample, timestep, conditioning)
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
    let timesteps = scheduler.timesteps().to_vec();
    let task = Task::begin(progress, "denoising", "steps", timesteps.len().saturating_sub(start.first));
    let mut picture =
        Denoised { scheduler, guidance, kept: start.kept.as_ref(), latents: start.latents.shallow_clone(), generator };
    for (index, timestep) in timesteps.into_iter().enumerate().skip(start.first) {
        task.advance(&format!("timestep {timestep:.0}"));
        let prediction = unet.predict(&picture.input(index)?, timestep, &guidance.conditioning)?;
        picture.step(index, &prediction)?;
        on_step(index, &picture.latents)?;
    }
    Ok(picture.latents)
}

/// A picture on its way from noise.
pub struct Denoised<'a> {
    scheduler: &'a mut dyn Scheduler,
    guidance: &'a Guidance,
    kept: Option<&'a Kept>,
    latents: Tensor,
    generator: &'a mut Generator,
}

impl<'a> Denoised<'a> {
    /// The picture before the first step, which starts from unit `noise` [1, c, h, w].
    ///
    /// # Errors
    /// If libtorch refuses an operation.
    pub fn from_noise(
        scheduler: &'a mut dyn Scheduler,
        guidance: &'a Guidance,
        noise: &Tensor,
        generator: &'a mut Generator,
    ) -> Result<Self> {
        let latents = Start::noise(scheduler, noise)?.latents;
        Ok(Denoised { scheduler, guidance, kept: None, latents, generator })
    }

    /// The latents after the steps so far: [1, c, h, w].
    pub fn latents(&self) -> &Tensor {
        &self.latents
    }

    /// The timesteps, one for each call of the UNet.
    #[must_use]
    pub fn timesteps(&self) -> &[f64] {
        self.scheduler.timesteps()
    }

    /// The UNet's input for the call `index`: a row for each half of the guidance.
    ///
    /// # Errors
    /// If libtorch refuses an operation.
    pub fn input(&self, index: usize) -> Result<Tensor> {
        let repeated = self.latents.f_repeat([self.guidance.rows()?, 1, 1, 1])?;
        let input = self.scheduler.scale_model_input(&repeated, index)?;
        Ok(match &self.guidance.image {
            Some(image) => Tensor::f_cat(&[&input, image], 1)?,
            None => input,
        })
    }

    /// Goes on by the UNet's prediction for [`input`](Self::input).
    ///
    /// # Errors
    /// [`Error::NotFinite`] if the latents become NaN or infinite.
    pub fn step(&mut self, index: usize, prediction: &Tensor) -> Result<()> {
        let kind = self.latents.f_kind()?;
        let guided = match (self.guidance.scale, self.guidance.image_scale) {
            (None, _) => prediction.shallow_clone(),
            (Some(scale), Some(image_scale)) => guided_twice(prediction, scale, image_scale)?,
            (Some(scale), None) => {
                let (negative, positive) = (prediction.f_narrow(0, 0, 1)?, prediction.f_narrow(0, 1, 1)?);
                let guided = negative.f_add(&positive.f_sub(&negative)?.f_mul_scalar(scale)?)?;
                rescaled(guided, &positive, self.guidance.rescale)?
            }
        };
        self.latents = self.scheduler.step(index, &guided, &self.latents, self.generator)?.f_to_kind(kind)?;
        if let Some(kept) = self.kept {
            self.latents = kept.put_back(self.scheduler, index + 1, &self.latents)?;
        }
        if !is_finite(&self.latents)? {
            let hint = if kind == tch::Kind::Half { " (fp16 overflows in some models; try --dtype bf16 or f32)" } else { "" };
            let timestep = self.scheduler.timesteps()[index];
            return Err(Error::NotFinite(format!("the latents became NaN or infinite at timestep {timestep:.0}{hint}")));
        }
        Ok(())
    }
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
