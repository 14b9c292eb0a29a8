//! The samplers of Karras et al. 2022 (EDM, arXiv:2206.00364) for models that were trained with
//! their preconditioning (table 1 there), such as Playground v2.5. Timesteps are ln(σ) / 4.

use serde::Deserialize;
use squeeze_base::error::Result;
use squeeze_numerics::random::Generator;
use tch::{Device, Kind, Tensor};

use super::multistep::{Level, Multistep};
use super::sigmas::FinalSigma;
use super::threshold::Threshold;
use super::{Prediction, Scheduler, check_index, log, over, scalar, sqrt, times};
use crate::checkpoint::ConfigFile;

/// `sigma_schedule`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Curve {
    /// Equation 5.
    Karras,
    /// A geometric progression.
    Exponential,
}

/// The preconditioning, and the noise levels that are visited.
#[derive(Debug)]
struct Edm {
    timesteps: Vec<f64>,
    /// The noise before each step and after the last.
    sigmas: Vec<f32>,
    sigma_max: f64,
    /// The standard deviation of the model's data.
    sigma_data: f64,
    prediction: Prediction,
}

impl Edm {
    /// Takes the keys. `precise` says whether Karras's curve is computed in fp64 and the last noise
    /// level is that of the last step, as in diffusers' `EDMEulerScheduler`.
    fn read(file: &mut ConfigFile, steps: usize, precise: bool) -> Result<(Self, FinalSigma)> {
        let prediction = file.or("prediction_type", Prediction::Epsilon)?;
        if prediction == Prediction::Sample {
            return Err(file.error("prediction_type", "= sample is not supported by this class, in diffusers neither"));
        }
        let min = positive(file, "sigma_min", 0.002)?;
        let max = positive(file, "sigma_max", 80.0)?;
        let sigma_data = positive(file, "sigma_data", 0.5)?;
        let rho = positive(file, "rho", 7.0)?;
        if min >= max {
            return Err(file.error("sigma_min", format!("= {min} is not below `sigma_max` = {max}")));
        }
        let curve = file.or("sigma_schedule", Curve::Karras)?;
        let end = file.or("final_sigmas_type", FinalSigma::Zero)?;
        let line = |start: f64, stop: f64, kind| Tensor::f_linspace(start, stop, steps as i64, (kind, Device::Cpu));
        let sigmas = match curve {
            Curve::Karras => {
                let (most, least) = (max.powf(1.0 / rho), min.powf(1.0 / rho));
                let ramp = line(0.0, 1.0, if precise { Kind::Double } else { Kind::Float })?;
                ramp.f_mul_scalar(least - most)?.f_add_scalar(most)?.f_pow_tensor_scalar(rho)?
            }
            Curve::Exponential => line(min.ln(), max.ln(), Kind::Float)?.f_exp()?.f_flip([0])?,
        };
        let mut sigmas: Vec<f32> = Vec::try_from(&sigmas.f_to_kind(Kind::Float)?)?;
        let falls = sigmas.windows(2).all(|pair| pair[0] > pair[1]);
        let last = sigmas.last().copied().filter(|last| falls && *last > 0.0 && last.is_finite());
        let Some(last) = last else {
            return Err(file.error("rho", format!("= {rho} makes no {steps} noise levels from {max} to {min}")));
        };
        let timesteps = sigmas.iter().map(|sigma| Ok(f64::from(0.25 * log(*sigma)?))).collect::<Result<_>>()?;
        sigmas.push(match end {
            FinalSigma::Zero => 0.0,
            FinalSigma::SigmaMin if precise => last,
            FinalSigma::SigmaMin => min as f32,
        });
        Ok((Edm { timesteps, sigmas, sigma_max: max, sigma_data, prediction }, end))
    }

    fn init_noise_sigma(&self) -> f64 {
        (self.sigma_max * self.sigma_max + 1.0).sqrt()
    }

    /// σ² + σ_data² at step `index`.
    fn variance(&self, index: usize) -> f32 {
        let sigma = self.sigmas[index];
        sigma * sigma + (self.sigma_data * self.sigma_data) as f32
    }

    fn scaled(&self, sample: &Tensor, index: usize) -> Result<Tensor> {
        check_index(index, &self.timesteps)?;
        Ok(sample.f_mul(&scalar(1.0 / sqrt(self.variance(index))?)?)?)
    }

    fn noisy(&self, index: usize, picture: &Tensor, noise: &Tensor) -> Result<Tensor> {
        check_index(index, &self.timesteps)?;
        Ok(picture.f_add(&times(self.sigmas[index], noise)?)?)
    }

    /// The picture that a model output predicts.
    fn denoised(&self, index: usize, model_output: &Tensor, sample: &Tensor) -> Result<Tensor> {
        let variance = self.variance(index);
        let kept = (self.sigma_data * self.sigma_data) as f32 / variance;
        let sign = if self.prediction == Prediction::Velocity { -1.0 } else { 1.0 };
        let added = sign * self.sigmas[index] * self.sigma_data as f32 / sqrt(variance)?;
        Ok(times(kept, sample)?.f_add(&times(added, model_output)?)?)
    }
}

/// Takes a key whose value must be above zero.
fn positive(file: &mut ConfigFile, key: &str, default: f64) -> Result<f64> {
    let value = file.or(key, default)?;
    if value > 0.0 && value.is_finite() {
        return Ok(value);
    }
    Err(file.error(key, format!("= {value} is not above 0")))
}

/// diffusers' `EDMEulerScheduler`, without its optional noise (`s_churn` 0).
#[derive(Debug)]
pub(super) struct EdmEuler(Edm);

impl EdmEuler {
    pub(super) fn new(file: &mut ConfigFile, steps: usize) -> Result<Self> {
        Ok(EdmEuler(Edm::read(file, steps, true)?.0))
    }
}

impl Scheduler for EdmEuler {
    fn timesteps(&self) -> &[f64] {
        &self.0.timesteps
    }

    fn init_noise_sigma(&self) -> f64 {
        self.0.init_noise_sigma()
    }

    fn scale_model_input(&self, sample: &Tensor, index: usize) -> Result<Tensor> {
        self.0.scaled(sample, index)
    }

    fn step(&mut self, index: usize, model_output: &Tensor, sample: &Tensor, _: &mut Generator) -> Result<Tensor> {
        check_index(index, &self.0.timesteps)?;
        let (from, to) = (self.0.sigmas[index], self.0.sigmas[index + 1]);
        let sample = sample.f_to_kind(Kind::Float)?;
        let denoised = self.0.denoised(index, model_output, &sample)?;
        let derivative = over(&sample.f_sub(&denoised)?, from)?;
        let next = sample.f_add(&derivative.f_mul(&scalar(to - from)?)?)?;
        Ok(next.f_to_kind(model_output.f_kind()?)?)
    }

    fn add_noise(&self, index: usize, picture: &Tensor, noise: &Tensor) -> Result<Tensor> {
        self.0.noisy(index, picture, noise)
    }
}

/// diffusers' `EDMDPMSolverMultistepScheduler`.
#[derive(Debug)]
pub(super) struct EdmDpmSolver {
    edm: Edm,
    threshold: Option<Threshold>,
    multistep: Multistep,
}

impl EdmDpmSolver {
    pub(super) fn new(file: &mut ConfigFile, steps: usize) -> Result<Self> {
        let (edm, end) = Edm::read(file, steps, false)?;
        let threshold = Threshold::read(file)?;
        let multistep = Multistep::read(file, end)?.for_steps(steps);
        if multistep.is_of_noise() {
            let problem = "of noise is not a form of this class, in diffusers neither (dpmsolver++ and sde-dpmsolver++ are)";
            return Err(file.error("algorithm_type", problem));
        }
        if end == FinalSigma::SigmaMin && multistep.divides_by_last_step() {
            let problem =
                "= sigma_min makes a last step of length 0, which `solver_type: heun` and `solver_order: 3` cannot take";
            return Err(file.error("final_sigmas_type", problem));
        }
        Ok(EdmDpmSolver { edm, threshold, multistep })
    }
}

impl Scheduler for EdmDpmSolver {
    fn timesteps(&self) -> &[f64] {
        &self.edm.timesteps
    }

    fn init_noise_sigma(&self) -> f64 {
        self.edm.init_noise_sigma()
    }

    fn scale_model_input(&self, sample: &Tensor, index: usize) -> Result<Tensor> {
        self.edm.scaled(sample, index)
    }

    fn step(&mut self, index: usize, model_output: &Tensor, sample: &Tensor, generator: &mut Generator) -> Result<Tensor> {
        self.multistep.check(index)?;
        let sigmas = &self.edm.sigmas;
        let level = |index: usize| Level::exploding(sigmas[index]);
        let picture = self.edm.denoised(index, model_output, sample)?;
        let picture = self.threshold.map_or(Ok(picture.shallow_clone()), |threshold| threshold.apply(&picture))?;
        let noise = self.multistep.noise(sample, picture.f_kind()?, generator)?;
        self.multistep.step(index, &level, &picture, sample, noise)
    }

    fn add_noise(&self, index: usize, picture: &Tensor, noise: &Tensor) -> Result<Tensor> {
        self.edm.noisy(index, picture, noise)
    }

    fn begin_at(&mut self, index: usize) -> Result<()> {
        check_index(index, &self.edm.timesteps)?;
        self.multistep.begin_at(index);
        Ok(())
    }
}
