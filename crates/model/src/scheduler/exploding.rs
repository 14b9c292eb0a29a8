//! The steps of a sampler in the variance-exploding view of Karras et al. 2022 (arXiv:2206.00364):
//! latents are the picture plus sigma times the noise.

use squeeze_base::error::Result;
use tch::Tensor;

use super::sigmas::{SigmaCurve, logarithms, timestep_of};
use super::spacing::SpacingKind;
use super::{check_index, over, single, sqrt, times};

/// Timesteps and noise levels.
#[derive(Debug)]
pub(super) struct Exploding {
    /// Of each call of the model.
    pub timesteps: Vec<f64>,
    /// The noise at each call of the model and after the last, relative to the picture.
    pub sigmas: Vec<f32>,
    /// The factor of the first noise.
    pub init_noise_sigma: f32,
}

impl Exploding {
    /// The steps with these timesteps and one sigma more.
    pub(super) fn new(timesteps: Vec<f64>, sigmas: Vec<f32>, spacing: SpacingKind) -> Result<Self> {
        let max = sigmas.iter().copied().fold(0.0, f32::max);
        let init_noise_sigma = if spacing == SpacingKind::Leading { sqrt(max * max + 1.0)? } else { max };
        Ok(Exploding { timesteps, sigmas, init_noise_sigma })
    }

    /// The sigmas before and after call `index`.
    ///
    /// # Errors
    /// If there is no such call.
    pub(super) fn sigmas_at(&self, index: usize) -> Result<(f32, f32)> {
        check_index(index, &self.timesteps)?;
        Ok((self.sigmas[index], self.sigmas[index + 1]))
    }

    /// The latents before call `index`, scaled to unit variance as the model takes them.
    ///
    /// # Errors
    /// As [`sigmas_at`](Self::sigmas_at).
    pub(super) fn scaled(&self, sample: &Tensor, index: usize) -> Result<Tensor> {
        let (sigma, _) = self.sigmas_at(index)?;
        over(sample, sqrt(sigma * sigma + 1.0)?)
    }

    /// A picture's latents with unit `noise`, before call `index`.
    ///
    /// # Errors
    /// As [`sigmas_at`](Self::sigmas_at).
    pub(super) fn noisy(&self, index: usize, picture: &Tensor, noise: &Tensor) -> Result<Tensor> {
        let (sigma, _) = self.sigmas_at(index)?;
        Ok(picture.f_add(&times(sigma, noise)?)?)
    }
}

/// Timesteps and sigmas on `curve` between the first and the last of `sigmas`; `None` for the
/// schedule of the training, whose sigmas are `table`.
pub(super) fn curved(curve: &SigmaCurve, sigmas: &[f64], table: &[f32], steps: usize) -> Option<(Vec<f64>, Vec<f64>)> {
    let curved = curve.sigmas(*sigmas.first()?, *sigmas.last()?, steps)?;
    let logs = logarithms(table);
    Some((curved.iter().map(|sigma| single(timestep_of(*sigma, &logs))).collect(), curved))
}
