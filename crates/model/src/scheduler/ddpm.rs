//! Ancestral sampling of denoising diffusion probabilistic models (Ho et al. 2020,
//! arXiv:2006.11239, equation 7).

use serde::Deserialize;
use squeeze_base::error::Result;
use squeeze_numerics::random::Generator;
use tch::Tensor;

use super::clip::Clip;
use super::noise::NoiseSchedule;
use super::predicted::picture_and_noise;
use super::spacing::{Spacing, SpacingKind};
use super::{Prediction, Scheduler, check_index, exp, log, mixed, noise_like, sqrt, times};
use crate::checkpoint::ConfigFile;

/// `variance_type`. The learned ones need a UNet with twice the channels, and diffusers'
/// `fixed_large_log` is the root of a negative number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
enum Variance {
    /// The least that is possible.
    #[serde(rename = "fixed_small")]
    Small,
    /// The same by way of its logarithm.
    #[serde(rename = "fixed_small_log")]
    SmallLog,
    /// The most.
    #[serde(rename = "fixed_large")]
    Large,
}

/// diffusers' `DDPMScheduler`.
#[derive(Debug)]
pub(super) struct Ddpm {
    timesteps: Vec<f64>,
    /// ᾱ at each step, and 1 after the last.
    signal: Vec<f32>,
    clip: Clip,
    prediction: Prediction,
    variance: Variance,
}

impl Ddpm {
    pub(super) fn new(file: &mut ConfigFile, noise: &NoiseSchedule, steps: usize) -> Result<Self> {
        let prediction = file.or("prediction_type", Prediction::Epsilon)?;
        let spacing = Spacing::read(file, SpacingKind::Leading)?;
        let clip = Clip::read(file, true)?;
        let variance = file.or("variance_type", Variance::Small)?;
        let table = noise.signal()?;
        let timesteps = spacing.whole_timesteps(table.len(), steps)?;
        let mut signal: Vec<f32> = timesteps.iter().map(|timestep| table[*timestep]).collect();
        if prediction == Prediction::Epsilon && signal.iter().any(|alpha| *alpha <= 0.0) && !clip.is_on() {
            let problem = "= epsilon cannot be sampled from a timestep that is pure noise (rescale_betas_zero_snr)";
            return Err(file.error("prediction_type", problem));
        }
        signal.push(1.0);
        let timesteps = timesteps.into_iter().map(|timestep| timestep as f64).collect();
        Ok(Ddpm { timesteps, signal, clip, prediction, variance })
    }
}

impl Scheduler for Ddpm {
    fn timesteps(&self) -> &[f64] {
        &self.timesteps
    }

    fn step(&mut self, index: usize, model_output: &Tensor, sample: &Tensor, generator: &mut Generator) -> Result<Tensor> {
        check_index(index, &self.timesteps)?;
        let (before, after) = (self.signal[index], self.signal[index + 1]);
        let (picture, _) = picture_and_noise(self.prediction, before, model_output, sample)?;
        let picture = self.clip.apply(picture)?;
        let kept = before / after;
        let added = 1.0 - kept;
        let of_picture = sqrt(after)? * added / (1.0 - before);
        let of_sample = sqrt(kept)? * (1.0 - after) / (1.0 - before);
        let mean = times(of_picture, &picture)?.f_add(&times(of_sample, sample)?)?;
        if self.timesteps[index] == 0.0 {
            return Ok(mean);
        }
        let small = ((1.0 - after) / (1.0 - before) * added).max(1e-20);
        let deviation = match self.variance {
            Variance::Small => sqrt(small)?,
            Variance::SmallLog => exp(0.5 * log(small)?)?,
            Variance::Large => sqrt(added)?,
        };
        let noise = noise_like(model_output, model_output.f_kind()?, generator)?;
        Ok(mean.f_add(&times(deviation, &noise)?)?)
    }

    fn add_noise(&self, index: usize, picture: &Tensor, noise: &Tensor) -> Result<Tensor> {
        check_index(index, &self.timesteps)?;
        mixed(self.signal[index], picture, noise)
    }
}
