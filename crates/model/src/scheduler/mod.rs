//! Samplers: from a UNet's predictions to a picture's latents.
//!
//! Each equals the diffusers 0.42.1 class of its name, in the order and precision of its
//! arithmetic: what diffusers computes in numpy's float64 is `f64` here, what it computes in
//! single-element fp32 tensors is `f32`, and latents go through libtorch.

mod clip;
mod config;
mod ddim;
mod ddpm;
mod distilled;
mod dpm;
mod dpm_sde;
mod edm;
mod euler;
mod euler_ancestral;
mod exploding;
mod heun;
mod kind;
mod lcm;
mod multistep;
mod noise;
mod plms;
mod predicted;
mod sigmas;
mod spacing;
mod tcd;
mod threshold;
mod unipc;

pub use config::SchedulerConfig;
pub use kind::{SchedulerChoice, SchedulerKind};
pub use spacing::SpacingKind;
use squeeze_base::error::{Error, Result};
use squeeze_numerics::random::Generator;
use tch::{Kind, Tensor};

/// A sampler with its timesteps laid out, ready for one picture after another.
///
/// Latents are [n, c, h, w] of any floating kind, on any device; they come back in the prediction's
/// kind. For each `index` in turn, the UNet is given `scale_model_input(latents, index)` and
/// `timesteps()[index]`, and its prediction goes to `step`.
pub trait Scheduler {
    /// The timesteps for the UNet, noisiest first, in units of training timesteps.
    ///
    /// Whole numbers, except where the sigmas are interpolated. There is one for each call of the
    /// UNet, and their number can differ from the requested steps: Heun's method and DPM++ SDE call
    /// the UNet twice in every step but the last, PLMS repeats its first step, and, as in
    /// diffusers, the rounding of trailing spacing adds a timestep for some counts (61 of 1000, for
    /// example).
    fn timesteps(&self) -> &[f64];

    /// The factor by which unit Gaussian noise is multiplied to give the first latents.
    fn init_noise_sigma(&self) -> f64 {
        1.0
    }

    /// The input of the UNet at step `index`, from the latents.
    ///
    /// # Errors
    /// If there is no such step, or libtorch fails.
    fn scale_model_input(&self, sample: &Tensor, index: usize) -> Result<Tensor> {
        check_index(index, self.timesteps())?;
        Ok(sample.shallow_clone())
    }

    /// The latents after step `index`, from the UNet's (guided) prediction and the unscaled latents
    /// before it.
    ///
    /// Steps are taken in order; `index` 0 starts a new picture. Stochastic samplers draw from
    /// `generator`, which should be the one that drew the first latents.
    ///
    /// # Errors
    /// If there is no such step or it is out of order, or libtorch fails.
    fn step(&mut self, index: usize, model_output: &Tensor, sample: &Tensor, generator: &mut Generator) -> Result<Tensor>;

    /// The latents before step `index` of a picture whose scaled latents are `picture`, from unit
    /// `noise`: both [n, c, h, w] (`add_noise` in diffusers).
    ///
    /// # Errors
    /// If there is no such step, or libtorch fails.
    fn add_noise(&self, index: usize, picture: &Tensor, noise: &Tensor) -> Result<Tensor>;

    /// The index in [`timesteps`](Self::timesteps) with which a run begins that leaves out the
    /// first `step` of the requested steps (`order` in diffusers). Samplers that call the UNet
    /// twice a step have another than `step`.
    fn first_call(&self, step: usize) -> usize {
        step
    }

    /// Starts a new picture at step `index`, which the next call of [`step`](Self::step) takes.
    ///
    /// # Errors
    /// If there is no such step.
    fn begin_at(&mut self, index: usize) -> Result<()> {
        check_index(index, self.timesteps())
    }
}

/// The quantity that the network was trained to predict (`prediction_type`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
enum Prediction {
    /// The noise.
    Epsilon,
    /// The picture without its noise.
    Sample,
    /// The velocity of Salimans & Ho 2022: √ᾱ·noise - √(1-ᾱ)·picture.
    #[serde(rename = "v_prediction")]
    Velocity,
}

/// A number as an fp32 tensor of no dimensions on the CPU, as in diffusers. It can be combined with
/// tensors of any device and kind.
fn scalar(value: f32) -> Result<Tensor> {
    Ok(Tensor::f_from_slice(&[value])?.f_squeeze()?)
}

/// A coefficient times a tensor, in the tensor's kind.
///
/// The coefficient is the left factor, as mostly in diffusers. For fp16 and bf16 on the CPU,
/// libtorch rounds a left factor to the tensor's kind first, but not a right one.
fn times(coefficient: f32, tensor: &Tensor) -> Result<Tensor> {
    Ok(scalar(coefficient)?.f_mul(tensor)?)
}

/// A tensor divided by a coefficient, which can differ in the last bit from a multiplication by the
/// inverse.
fn over(tensor: &Tensor, coefficient: f32) -> Result<Tensor> {
    Ok(tensor.f_div(&scalar(coefficient)?)?)
}

/// libtorch's fp32 square root. Rust's result is the nearest fp32 number; libtorch's square roots,
/// logarithms and exponentials need not be.
fn sqrt(x: f32) -> Result<f32> {
    Ok(f32::try_from(&scalar(x)?.f_sqrt()?)?)
}

/// libtorch's fp32 logarithm.
fn log(x: f32) -> Result<f32> {
    Ok(f32::try_from(&scalar(x)?.f_log()?)?)
}

/// libtorch's fp32 exponential.
fn exp(x: f32) -> Result<f32> {
    Ok(f32::try_from(&scalar(x)?.f_exp()?)?)
}

/// libtorch's fp32 exponential less 1.
fn expm1(x: f32) -> Result<f32> {
    Ok(f32::try_from(&scalar(x)?.f_expm1()?)?)
}

/// The value rounded to fp32, in which diffusers passes it on.
fn single(value: f64) -> f64 {
    f64::from(value as f32)
}

/// A picture's latents with unit `noise`, of which `signal` (ᾱ) is the picture's share.
fn mixed(signal: f32, picture: &Tensor, noise: &Tensor) -> Result<Tensor> {
    Ok(times(sqrt(signal)?, picture)?.f_add(&times(sqrt(1.0 - signal)?, noise)?)?)
}

/// Unit Gaussian noise in the shape and on the device of `tensor`, drawn on the CPU.
fn noise_like(tensor: &Tensor, kind: Kind, generator: &mut Generator) -> Result<Tensor> {
    Ok(generator.draw(&tensor.size(), kind)?.f_to_device(tensor.device())?)
}

/// Refuses a step beyond the last.
fn check_index(index: usize, timesteps: &[f64]) -> Result<()> {
    if index < timesteps.len() {
        return Ok(());
    }
    Err(Error::Argument(format!("there is no step {index}: the sampler has {}", timesteps.len())))
}
