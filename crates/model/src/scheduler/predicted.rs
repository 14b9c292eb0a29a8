//! The two parts of a noisy sample that a model output tells, in the variance-preserving view:
//! sample = √ᾱ·picture + √(1-ᾱ)·noise.

use squeeze_base::error::Result;
use tch::Tensor;

use super::{Prediction, over, sqrt, times};

/// The picture and the noise in `sample`, of which `signal` (ᾱ) is the picture's share.
pub(super) fn picture_and_noise(
    prediction: Prediction,
    signal: f32,
    model_output: &Tensor,
    sample: &Tensor,
) -> Result<(Tensor, Tensor)> {
    let (signal, noise) = (sqrt(signal)?, sqrt(1.0 - signal)?);
    Ok(match prediction {
        Prediction::Epsilon => (over(&sample.f_sub(&times(noise, model_output)?)?, signal)?, model_output.shallow_clone()),
        Prediction::Sample => (model_output.shallow_clone(), over(&sample.f_sub(&times(signal, model_output)?)?, noise)?),
        Prediction::Velocity => (
            times(signal, sample)?.f_sub(&times(noise, model_output)?)?,
            times(signal, model_output)?.f_add(&times(noise, sample)?)?,
        ),
    })
}

/// The picture without noise in `sample` of the variance-exploding view, picture + sigma·noise.
pub(super) fn denoised(prediction: Prediction, sigma: f32, model_output: &Tensor, sample: &Tensor) -> Result<Tensor> {
    let variance = sigma * sigma + 1.0;
    match prediction {
        Prediction::Epsilon => Ok(sample.f_sub(&times(sigma, model_output)?)?),
        Prediction::Sample => Ok(model_output.shallow_clone()),
        Prediction::Velocity => {
            let removed = model_output.f_mul(&super::scalar(-sigma / sqrt(variance)?)?)?;
            Ok(removed.f_add(&over(sample, variance)?)?)
        }
    }
}
