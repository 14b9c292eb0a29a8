//! DPM-Solver++ of second order, single step (Lu et al. 2022, arXiv:2211.01095), as a stochastic
//! sampler: "DPM++ SDE" of k-diffusion.
//!
//! Every step but the last calls the model twice: where it starts, and half way in the logarithm of
//! the noise. The timesteps list both calls. Both halves go below the noise level that they lead
//! to, and the increments of one Brownian motion lead back up to it.

use squeeze_base::error::{Error, Result};
use squeeze_numerics::brownian::BrownianTree;
use squeeze_numerics::random::Generator;
use tch::Tensor;

use super::exploding::Exploding;
use super::noise::{NoiseSchedule, sigmas};
use super::predicted::denoised;
use super::sigmas::{SigmaCurve, logarithms, sigma_at, timestep_of};
use super::spacing::{Spacing, SpacingKind};
use super::{Prediction, Scheduler, check_index, exp, expm1, log, over, scalar, sqrt, times};
use crate::checkpoint::ConfigFile;

/// diffusers' `DPMSolverSDEScheduler`.
///
/// Its noise is that of torchsde's Brownian tree. Without `noise_sampler_seed`, diffusers seeds the
/// tree from torch's global generator, so that no two runs are equal; here the run's own seed is
/// the tree's, as if the key had its value.
#[derive(Debug)]
pub(super) struct DpmSolverSde {
    levels: Exploding,
    prediction: Prediction,
    /// `noise_sampler_seed`.
    seed: Option<u64>,
    /// The motion of this picture, in which time is sigma.
    tree: Option<BrownianTree>,
    /// The sample before a step, between the step's two calls.
    start: Option<Tensor>,
}

impl DpmSolverSde {
    pub(super) fn new(file: &mut ConfigFile, noise: &NoiseSchedule, steps: usize) -> Result<Self> {
        let prediction = file.or("prediction_type", Prediction::Epsilon)?;
        if prediction == Prediction::Sample {
            return Err(file.error("prediction_type", "= sample is not supported by this class, in diffusers neither"));
        }
        let spacing = Spacing::read(file, SpacingKind::Linspace)?;
        let curve = SigmaCurve::read(file)?.with_karras_of_training(file);
        let seed: Option<u64> = file.optional("noise_sampler_seed")?;

        let table = sigmas(&noise.positive_signal(file)?)?;
        let logs = logarithms(&table);
        let mut visited: Vec<f64> = spacing.timesteps(table.len(), steps);
        let mut sigmas: Vec<f64> = visited.iter().map(|timestep| sigma_at(*timestep, &table)).collect();
        if let (Some(first), Some(last)) = (sigmas.first(), sigmas.last())
            && let Some(curved) = curve.sigmas(*first, *last, steps)
        {
            visited = curved.iter().map(|sigma| timestep_of(*sigma, &logs)).collect();
            sigmas = curved;
        }
        let mut timesteps = Vec::with_capacity(2 * visited.len());
        let mut twice = Vec::with_capacity(2 * visited.len());
        for (index, (&timestep, &sigma)) in visited.iter().zip(&sigmas).enumerate() {
            if let Some(before) = index.checked_sub(1) {
                let (from, to) = (-sigmas[before].ln(), -sigma.ln());
                timesteps.push(timestep_of((-(from + (to - from) * 0.5)).exp(), &logs));
                twice.push(sigma as f32);
            }
            timesteps.push(timestep);
            twice.push(sigma as f32);
        }
        twice.push(0.0);
        let levels = Exploding::new(timesteps, twice, spacing.kind)?;
        Ok(DpmSolverSde { levels, prediction, seed, tree: None, start: None })
    }

    /// The sigmas before and after the step to which call `index` belongs.
    fn step_of(&self, index: usize) -> (f32, f32) {
        let first = index - index % 2;
        (self.levels.sigmas[first], self.levels.sigmas[first + 1])
    }

    /// -ln σ half way through a step.
    fn middle(from: f32, to: f32) -> Result<f32> {
        let (t, next) = (-log(from)?, -log(to)?);
        Ok(t + (next - t) * 0.5)
    }

    /// The sigma with which the model is called.
    fn sigma_of_call(&self, index: usize) -> Result<f32> {
        let (from, to) = self.step_of(index);
        if index.is_multiple_of(2) { Ok(from) } else { exp(-Self::middle(from, to)?) }
    }

    /// The motion over all noise levels of the schedule.
    fn plant(&self, sample: &Tensor, seed: u64) -> Result<BrownianTree> {
        let levels = self.levels.sigmas.iter().copied().filter(|sigma| *sigma > 0.0);
        let (min, max) = levels.fold((f32::INFINITY, 0.0), |(min, max), sigma| (f32::min(min, sigma), f32::max(max, sigma)));
        BrownianTree::new(f64::from(min), f64::from(max), &sample.size(), sample.f_kind()?, seed)
    }

    /// The motion's increment from one noise level down to another, as unit noise.
    fn noise(tree: &BrownianTree, from: f32, to: f32, sample: &Tensor) -> Result<Tensor> {
        let increment = tree.increment(f64::from(to), f64::from(from))?.f_neg()?.f_to_device(sample.device())?;
        over(&increment, sqrt((to - from).abs())?)
    }
}

impl Scheduler for DpmSolverSde {
    fn timesteps(&self) -> &[f64] {
        &self.levels.timesteps
    }

    fn init_noise_sigma(&self) -> f64 {
        f64::from(self.levels.init_noise_sigma)
    }

    fn scale_model_input(&self, sample: &Tensor, index: usize) -> Result<Tensor> {
        check_index(index, &self.levels.timesteps)?;
        let sigma = self.sigma_of_call(index)?;
        over(sample, sqrt(sigma * sigma + 1.0)?)
    }

    fn step(&mut self, index: usize, model_output: &Tensor, sample: &Tensor, generator: &mut Generator) -> Result<Tensor> {
        check_index(index, &self.levels.timesteps)?;
        let (from, to) = self.step_of(index);
        let continues = index % 2 == 1;
        let start = self.start.take();
        if continues && start.is_none() {
            return Err(Error::Argument(format!("step {index} out of order: it continues step {}", index - 1)));
        }
        if index == 0 {
            self.tree = None;
        }
        let picture = denoised(self.prediction, self.sigma_of_call(index)?, model_output, sample)?;
        let tree = match self.tree.take() {
            Some(tree) => tree,
            None => self.plant(sample, self.seed.unwrap_or_else(|| generator.seed()))?,
        };
        let tree = self.tree.insert(tree);
        if to == 0.0 {
            let derivative = over(&sample.f_sub(&picture)?, from)?;
            return Ok(sample.f_add(&derivative.f_mul(&scalar(to - from)?)?)?);
        }
        // The first call's half step leads from the sample to the middle, the second's whole step
        // from the same sample to the end.
        let (sample, t_next) = match start.filter(|_| continues) {
            Some(start) => (start, -log(to)?),
            None => (sample.shallow_clone(), Self::middle(from, to)?),
        };
        let t = -log(from)?;
        let (sigma_from, sigma_to) = (exp(-t)?, exp(-t_next)?);
        let (var_from, var_to) = (sigma_from * sigma_from, sigma_to * sigma_to);
        let up = sqrt(var_to * (var_from - var_to) / var_from)?.min(sigma_to);
        let t_down = -log(sqrt(var_to - up * up)?)?;
        let kept = times(exp(-t_down)? / sigma_from, &sample)?;
        let next = kept.f_sub(&times(expm1(t - t_down)?, &picture)?)?;
        let noise = Self::noise(tree, sigma_from, sigma_to, &sample)?;
        if !continues {
            self.start = Some(sample);
        }
        Ok(next.f_add(&noise.f_mul(&scalar(up)?)?)?)
    }

    fn add_noise(&self, index: usize, picture: &Tensor, noise: &Tensor) -> Result<Tensor> {
        self.levels.noisy(index, picture, noise)
    }

    fn first_call(&self, step: usize) -> usize {
        2 * step
    }

    fn begin_at(&mut self, index: usize) -> Result<()> {
        (self.tree, self.start) = (None, None);
        check_index(index, &self.levels.timesteps)
    }
}
