//! Samplers: from a UNet's predictions to a picture's latents.
//!
//! Each equals the diffusers 0.42.1 class of its name, in the order and precision of its
//! arithmetic: what diffusers computes in numpy's float64 is `f64` here, what it computes in
//! single-element fp32 tensors is `f32`, and latents go through libtorch.

mod config;
mod ddim;
mod dpm;
mod euler;
mod noise;
mod sigmas;
mod spacing;

use tch::Tensor;

pub use config::{SchedulerChoice, SchedulerConfig, SchedulerKind};

use crate::error::{Error, Result};

/// A sampler with its timesteps laid out, ready for one picture after another.
///
/// Latents are [n, c, h, w] of any floating kind, on any device; they come back in the prediction's
/// kind. For each `index` in turn, the UNet is given `scale_model_input(latents, index)` and
/// `timesteps()[index]`, and its prediction goes to `step`.
pub trait Scheduler {
    /// The timesteps for the UNet, noisiest first, in units of training timesteps.
    ///
    /// Whole numbers, except where the sigmas are interpolated. There may be one more or less than
    /// the steps asked for: with trailing spacing diffusers' own rounding adds one for some
    /// counts (61 of 1000, say), and so it does here.
    fn timesteps(&self) -> &[f64];

    /// What unit Gaussian noise is multiplied by to become the first latents.
    fn init_noise_sigma(&self) -> f64;

    /// The latents as the UNet is to see them at step `index`.
    ///
    /// # Errors
    /// If there is no such step, or libtorch fails.
    fn scale_model_input(&self, sample: &Tensor, index: usize) -> Result<Tensor>;

    /// The latents after step `index`, from the UNet's (guided) prediction and the unscaled latents
    /// before it.
    ///
    /// Steps are taken in order; `index` 0 starts a new picture.
    ///
    /// # Errors
    /// If there is no such step or it is out of turn, or libtorch fails.
    fn step(&mut self, index: usize, model_output: &Tensor, sample: &Tensor) -> Result<Tensor>;
}

/// What the network was trained to predict (`prediction_type`).
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

/// A number as diffusers holds it: an fp32 tensor of no dimensions on the CPU, which works with
/// tensors of any device and kind.
fn scalar(value: f32) -> Result<Tensor> {
    Ok(Tensor::f_from_slice(&[value])?.f_squeeze()?)
}

/// A coefficient times a tensor, whose kind stays.
///
/// On the left, as mostly in diffusers: for fp16 and bf16 on the CPU, libtorch first rounds it to
/// the tensor's kind, which it does not do with a factor on the right.
fn times(coefficient: f32, tensor: &Tensor) -> Result<Tensor> {
    Ok(scalar(coefficient)?.f_mul(tensor)?)
}

/// A tensor divided by a coefficient: not the same, to the last bit, as multiplying by its inverse.
fn over(tensor: &Tensor, coefficient: f32) -> Result<Tensor> {
    Ok(tensor.f_div(&scalar(coefficient)?)?)
}

/// libtorch's fp32 square root. Rust's is the nearest fp32; libtorch's need not be, nor its
/// logarithm and exponential.
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

/// Refuses a step beyond the last.
fn check_index(index: usize, timesteps: &[f64]) -> Result<()> {
    if index < timesteps.len() {
        return Ok(());
    }
    Err(Error::Failed(format!("there is no step {index}: the sampler has {}", timesteps.len())))
}
