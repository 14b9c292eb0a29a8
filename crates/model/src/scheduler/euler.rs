//! Euler's method in the variance-exploding view of Karras et al. 2022 (arXiv:2206.00364, algorithm
//! 2 without churn).

use serde::Deserialize;
use squeeze_base::error::Result;
use squeeze_numerics::random::Generator;
use tch::{Device, Kind, Tensor};

use super::exploding::{Exploding, curved};
use super::noise::{NoiseSchedule, sigmas};
use super::predicted::denoised;
use super::sigmas::{FinalSigma, SigmaCurve, logarithms, sigma_at};
use super::spacing::{Spacing, SpacingKind};
use super::{Prediction, Scheduler, log, over, single, times};
use crate::checkpoint::ConfigFile;

/// `interpolation_type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Interpolation {
    Linear,
    LogLinear,
}

/// `timestep_type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum TimestepType {
    Discrete,
    Continuous,
}

/// diffusers' `EulerDiscreteScheduler`, without its optional noise (`s_churn` 0).
#[derive(Debug)]
pub(super) struct Euler {
    levels: Exploding,
    prediction: Prediction,
}

impl Euler {
    pub(super) fn new(file: &mut ConfigFile, noise: &NoiseSchedule, steps: usize) -> Result<Self> {
        let prediction = file.or("prediction_type", Prediction::Epsilon)?;
        let spacing = Spacing::read(file, SpacingKind::Linspace)?;
        let interpolation = file.or("interpolation_type", Interpolation::Linear)?;
        let curve = SigmaCurve::read(file)?;
        let end = file.or("final_sigmas_type", FinalSigma::Zero)?;
        let timestep_type = file.or("timestep_type", TimestepType::Discrete)?;

        let table = sigmas(&noise.positive_signal(file)?)?;
        let mut timesteps: Vec<f64> = spacing.timesteps(table.len(), steps).into_iter().map(single).collect();
        let mut sigmas = match interpolation {
            Interpolation::Linear => timesteps.iter().map(|timestep| sigma_at(*timestep, &table)).collect(),
            Interpolation::LogLinear => log_linear(&logarithms(&table), steps)?,
        };
        if let Some(curved) = curved(&curve, &sigmas, &table, steps) {
            (timesteps, sigmas) = curved;
        }
        let mut sigmas: Vec<f32> = sigmas.into_iter().map(|sigma| sigma as f32).collect();
        sigmas.push(if end == FinalSigma::Zero { 0.0 } else { table[0] });
        // diffusers uses the key `timestep_type` for this prediction type only.
        if timestep_type == TimestepType::Continuous && prediction == Prediction::Velocity {
            timesteps =
                sigmas[..sigmas.len() - 1].iter().map(|sigma| Ok(f64::from(0.25 * log(*sigma)?))).collect::<Result<_>>()?;
        }
        Ok(Euler { levels: Exploding::new(timesteps, sigmas, spacing.kind)?, prediction })
    }
}

impl Scheduler for Euler {
    fn timesteps(&self) -> &[f64] {
        &self.levels.timesteps
    }

    fn init_noise_sigma(&self) -> f64 {
        f64::from(self.levels.init_noise_sigma)
    }

    fn scale_model_input(&self, sample: &Tensor, index: usize) -> Result<Tensor> {
        self.levels.scaled(sample, index)
    }

    fn step(&mut self, index: usize, model_output: &Tensor, sample: &Tensor, _: &mut Generator) -> Result<Tensor> {
        let (sigma, next) = self.levels.sigmas_at(index)?;
        let sample = sample.f_to_kind(Kind::Float)?;
        let denoised = denoised(self.prediction, sigma, model_output, &sample)?;
        let derivative = over(&sample.f_sub(&denoised)?, sigma)?;
        Ok(sample.f_add(&times(next - sigma, &derivative)?)?.f_to_kind(model_output.f_kind()?)?)
    }

    fn add_noise(&self, index: usize, picture: &Tensor, noise: &Tensor) -> Result<Tensor> {
        self.levels.noisy(index, picture, noise)
    }
}

/// `steps + 1` sigmas in geometric progression over the range of training. The last step ends at
/// the last of them.
fn log_linear(logarithms: &[f32], steps: usize) -> Result<Vec<f64>> {
    let (min, max) = (f64::from(logarithms[0]), f64::from(logarithms[logarithms.len() - 1]));
    let line = Tensor::f_linspace(max, min, steps as i64 + 1, (Kind::Float, Device::Cpu))?;
    Ok(Vec::try_from(&line.f_exp()?)?)
}
