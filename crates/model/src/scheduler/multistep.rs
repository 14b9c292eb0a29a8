//! Steps of DPM-Solver++ of first and second order, multistep (Lu et al. 2022, arXiv:2211.01095,
//! algorithm 2), and of its stochastic variant (equation 19 there, with fresh noise).

use serde::Deserialize;
use serde_json::json;
use squeeze_base::error::{Error, Result};
use squeeze_numerics::random::Generator;
use tch::{Kind, Tensor};

use super::sigmas::FinalSigma;
use super::{exp, log, noise_like, sqrt, times};
use crate::checkpoint::ConfigFile;

/// `solver_type`: the form of the second-order term.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum SolverType {
    /// The aliases are the names in other solvers (DEIS, UniPC); diffusers treats them as this one.
    #[serde(alias = "logrho", alias = "bh1", alias = "bh2")]
    Midpoint,
    Heun,
}

/// A noise level, as the solver sees it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Level {
    /// The factor of the picture (α).
    pub signal: f32,
    /// The factor of the noise (σ).
    pub noise: f32,
    /// Half the logarithm of the signal-to-noise ratio.
    pub lambda: f32,
}

impl Level {
    /// In the variance-preserving view, with the noise relative to the picture given.
    pub(super) fn preserving(sigma: f32) -> Result<Self> {
        let signal = 1.0 / sqrt(sigma * sigma + 1.0)?;
        let noise = sigma * signal;
        Ok(Level { signal, noise, lambda: log(signal)? - log(noise)? })
    }

    /// In the variance-exploding view.
    pub(super) fn exploding(sigma: f32) -> Result<Self> {
        Ok(Level { signal: 1.0, noise: sigma, lambda: -log(sigma)? })
    }
}

/// The solver, and what it remembers of the step before.
#[derive(Debug)]
pub(super) struct Multistep {
    order: usize,
    solver: SolverType,
    /// Whether each step adds fresh noise.
    stochastic: bool,
    /// Whether the last step is of first order, however many steps there are.
    first_order_last: bool,
    /// Whether it is if there are fewer than 15.
    lower_order_final: bool,
    steps: usize,
    /// The index of the next step.
    next: usize,
    /// The picture that the previous step predicted.
    previous: Option<Tensor>,
}

impl Multistep {
    /// Takes the solver's keys.
    pub(super) fn read(file: &mut ConfigFile, end: FinalSigma) -> Result<Self> {
        let order: usize = file.or("solver_order", 2)?;
        if !(1..=2).contains(&order) {
            return Err(file.error("solver_order", format!("= {order} is not supported (1 and 2 are)")));
        }
        let solver = file.or("solver_type", SolverType::Midpoint)?;
        let lower_order_final: bool = file.or("lower_order_final", true)?;
        let euler_at_final: bool = file.or("euler_at_final", false)?;
        file.only("thresholding", &[json!(false)])?;
        let algorithm: Option<String> = file.optional("algorithm_type")?;
        let stochastic = match (algorithm.as_deref(), end) {
            // diffusers treats "deis" as "dpmsolver++", but refuses a final sigma of zero with it.
            (None | Some("dpmsolver++"), _) | (Some("deis"), FinalSigma::SigmaMin) => false,
            (Some("sde-dpmsolver++"), _) => true,
            (Some(other), _) => {
                let problem = format!("= {other:?} is not supported (dpmsolver++ and sde-dpmsolver++ are)");
                return Err(file.error("algorithm_type", problem));
            }
        };
        let first_order_last = euler_at_final || end == FinalSigma::Zero;
        Ok(Multistep { order, solver, stochastic, first_order_last, lower_order_final, steps: 0, next: 0, previous: None })
    }

    /// The solver for a number of steps.
    pub(super) fn for_steps(self, steps: usize) -> Self {
        let first_order_last = self.first_order_last || self.lower_order_final && steps < 15;
        Multistep { steps, first_order_last, ..self }
    }

    /// The order of the steps between the first and the last.
    pub(super) fn order(&self) -> usize {
        self.order
    }

    /// Whether the second-order term divides by the length of the last step, which may be zero.
    pub(super) fn divides_by_last_step(&self) -> bool {
        self.order == 2 && self.solver == SolverType::Heun && !self.first_order_last
    }

    /// Makes `index` the next step, of a new picture.
    pub(super) fn begin_at(&mut self, index: usize) {
        (self.next, self.previous) = (index, None);
    }

    /// Refuses a step that does not exist or is out of order.
    pub(super) fn check(&self, index: usize) -> Result<()> {
        if index >= self.steps {
            return Err(Error::Argument(format!("there is no step {index}: the sampler has {}", self.steps)));
        }
        if index != 0 && index != self.next {
            return Err(Error::Argument(format!("step {index} out of order: the next is {}", self.next)));
        }
        Ok(())
    }

    /// The noise of a step in the shape of `sample`; `None` if the solver adds none.
    pub(super) fn noise(&self, sample: &Tensor, kind: Kind, generator: &mut Generator) -> Result<Option<Tensor>> {
        if self.stochastic { Ok(Some(noise_like(sample, kind, generator)?)) } else { Ok(None) }
    }

    /// The sample after step `index`, from the `picture` that the model predicts at its beginning.
    /// `levels` are those before the previous step, before this one, and after it.
    pub(super) fn step(
        &mut self,
        index: usize,
        (earlier, from, to): (Option<Level>, Level, Level),
        picture: &Tensor,
        sample: &Tensor,
        noise: Option<Tensor>,
    ) -> Result<Tensor> {
        let h = to.lambda - from.lambda;
        let decay = if noise.is_some() { exp(-2.0 * h)? - 1.0 } else { exp(-h)? - 1.0 };
        let mut next = match &noise {
            None => times(to.noise / from.noise, sample)?.f_sub(&times(to.signal * decay, picture)?)?,
            Some(_) => times(to.noise / from.noise * exp(-h)?, sample)?.f_add(&times(to.signal * -decay, picture)?)?,
        };
        let previous = if index == 0 { None } else { self.previous.as_ref() };
        let is_last = index + 1 == self.steps;
        if let (Some(previous), Some(earlier)) = (previous, earlier)
            && self.order == 2
            && !(is_last && self.first_order_last)
        {
            let ratio = (from.lambda - earlier.lambda) / h;
            let change = times(1.0 / ratio, &picture.f_sub(previous)?)?;
            next = match (self.solver, noise.is_some()) {
                (SolverType::Midpoint, _) => next.f_sub(&times(0.5 * (to.signal * decay), &change)?)?,
                (SolverType::Heun, false) => next.f_add(&times(to.signal * (decay / h + 1.0), &change)?)?,
                (SolverType::Heun, true) => next.f_add(&times(to.signal * (-decay / (-2.0 * h) + 1.0), &change)?)?,
            };
        }
        if let Some(noise) = noise {
            next = next.f_add(&times(to.noise * sqrt(-decay)?, &noise)?)?;
        }
        self.previous = Some(picture.shallow_clone());
        self.next = index + 1;
        Ok(next)
    }
}
