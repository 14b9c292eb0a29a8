//! Steps of DPM-Solver++ of first to third order, multistep (Lu et al. 2022, arXiv:2211.01095,
//! algorithm 2), of DPM-Solver, which integrates the noise (arXiv:2206.00927), and of the
//! stochastic variants of both (equation 19 of the former, with fresh noise).

use std::collections::VecDeque;

use serde::Deserialize;
use squeeze_base::error::{Error, Result};
use squeeze_numerics::random::Generator;
use tch::{Kind, Tensor};

use super::sigmas::FinalSigma;
use super::{exp, log, noise_like, sqrt, times};
use crate::checkpoint::ConfigFile;

/// `solver_type`: the form of the term of the second order.
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

/// `algorithm_type`: what is integrated, and whether each step adds fresh noise.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Algorithm {
    /// DPM-Solver++: the predicted picture.
    Picture,
    /// DPM-Solver (Lu et al. 2022, arXiv:2206.00927): the predicted noise.
    Noise,
    /// The stochastic variant of DPM-Solver++.
    StochasticPicture,
    /// The stochastic variant of DPM-Solver.
    StochasticNoise,
}

/// The solver, and what it remembers of the steps before.
#[derive(Debug)]
pub(super) struct Multistep {
    algorithm: Algorithm,
    order: usize,
    solver: SolverType,
    /// Whether the last step is of first order, however many steps there are.
    first_order_last: bool,
    /// Whether it is if there are fewer than 15, and the step before of second order.
    lower_order_final: bool,
    steps: usize,
    /// The index of the next step.
    next: usize,
    /// What the model predicted at the steps before, the latest first; fewer than `order`.
    previous: VecDeque<Tensor>,
}

/// The factors of a step: what is added for the sample, the prediction, its differences of first
/// and second order, and fresh noise.
struct Factors {
    sample: f32,
    prediction: f32,
    first: f32,
    second: f32,
    noise: f32,
}

impl Multistep {
    /// Takes the solver's keys, but for those of thresholding.
    pub(super) fn read(file: &mut ConfigFile, end: FinalSigma) -> Result<Self> {
        let order: usize = file.or("solver_order", 2)?;
        if !(1..=3).contains(&order) {
            return Err(file.error("solver_order", format!("= {order} is not supported (1, 2 and 3 are)")));
        }
        let solver = file.or("solver_type", SolverType::Midpoint)?;
        let lower_order_final: bool = file.or("lower_order_final", true)?;
        let euler_at_final: bool = file.or("euler_at_final", false)?;
        let algorithm: Option<String> = file.optional("algorithm_type")?;
        let algorithm = match (algorithm.as_deref(), end) {
            // diffusers treats "deis" as "dpmsolver++", but refuses a final sigma of zero with it.
            (None | Some("dpmsolver++"), _) | (Some("deis"), FinalSigma::SigmaMin) => Algorithm::Picture,
            (Some("sde-dpmsolver++"), _) => Algorithm::StochasticPicture,
            (Some("dpmsolver"), _) => Algorithm::Noise,
            (Some("sde-dpmsolver"), _) if order == 3 => {
                return Err(
                    file.error("solver_order", "= 3 is not a form of `algorithm_type: sde-dpmsolver`, in diffusers neither")
                );
            }
            (Some("sde-dpmsolver"), _) => Algorithm::StochasticNoise,
            (Some(other), _) => {
                let known = "dpmsolver++, sde-dpmsolver++, dpmsolver and sde-dpmsolver are";
                return Err(file.error("algorithm_type", format!("= {other:?} is not supported ({known})")));
            }
        };
        let first_order_last = euler_at_final || end == FinalSigma::Zero;
        let previous = VecDeque::new();
        Ok(Multistep { algorithm, order, solver, first_order_last, lower_order_final, steps: 0, next: 0, previous })
    }

    /// The solver for a number of steps.
    pub(super) fn for_steps(self, steps: usize) -> Self {
        let lower_order_final = self.lower_order_final && steps < 15;
        let first_order_last = self.first_order_last || lower_order_final;
        Multistep { steps, first_order_last, lower_order_final, ..self }
    }

    /// The order of the steps between the first and the last.
    pub(super) fn order(&self) -> usize {
        self.order
    }

    /// Whether the solver takes predictions of the noise, and not of the picture.
    pub(super) fn is_of_noise(&self) -> bool {
        matches!(self.algorithm, Algorithm::Noise | Algorithm::StochasticNoise)
    }

    /// Whether terms of higher order divide by the length of the last step, which may be zero.
    pub(super) fn divides_by_last_step(&self) -> bool {
        (self.order == 3 || self.order == 2 && self.solver == SolverType::Heun) && !self.first_order_last
    }

    /// Makes `index` the next step, of a new picture.
    pub(super) fn begin_at(&mut self, index: usize) {
        self.next = index;
        self.previous.clear();
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
        match self.algorithm {
            Algorithm::Picture | Algorithm::Noise => Ok(None),
            Algorithm::StochasticPicture | Algorithm::StochasticNoise => Ok(Some(noise_like(sample, kind, generator)?)),
        }
    }

    /// The order of step `index`.
    fn order_of(&self, index: usize) -> usize {
        let known = self.order.min(self.previous.len() + 1);
        match self.steps - index {
            1 if self.first_order_last => 1,
            2 if self.lower_order_final => known.min(2),
            _ => known,
        }
    }

    /// The factors of a step of `order`, in the order of diffusers' arithmetic.
    fn factors(&self, order: usize, from: Level, to: Level) -> Result<Factors> {
        let h = to.lambda - from.lambda;
        let heun = order == 3 || self.solver == SolverType::Heun;
        Ok(match self.algorithm {
            Algorithm::Picture => {
                let decay = exp(-h)? - 1.0;
                Factors {
                    sample: to.noise / from.noise,
                    prediction: -(to.signal * decay),
                    first: if heun { to.signal * (decay / h + 1.0) } else { -0.5 * (to.signal * decay) },
                    second: -(to.signal * ((decay + h) / (h * h) - 0.5)),
                    noise: 0.0,
                }
            }
            Algorithm::StochasticPicture => {
                let loss = 1.0 - exp(-2.0 * h)?;
                let twice = 2.0 * h;
                Factors {
                    sample: to.noise / from.noise * exp(-h)?,
                    prediction: to.signal * loss,
                    first: if heun { to.signal * (loss / (-2.0 * h) + 1.0) } else { 0.5 * (to.signal * loss) },
                    second: to.signal * ((loss - twice) / (twice * twice) - 0.5),
                    noise: to.noise * sqrt(loss)?,
                }
            }
            Algorithm::Noise => {
                let growth = exp(h)? - 1.0;
                Factors {
                    sample: to.signal / from.signal,
                    prediction: -(to.noise * growth),
                    first: if heun { -(to.noise * (growth / h - 1.0)) } else { -0.5 * (to.noise * growth) },
                    second: -(to.noise * ((growth - h) / (h * h) - 0.5)),
                    noise: 0.0,
                }
            }
            Algorithm::StochasticNoise => {
                let growth = exp(h)? - 1.0;
                Factors {
                    sample: to.signal / from.signal,
                    prediction: -2.0 * (to.noise * growth),
                    first: if heun { -2.0 * (to.noise * (growth / h - 1.0)) } else { -(to.noise * growth) },
                    second: 0.0,
                    noise: to.noise * sqrt(exp(2.0 * h)? - 1.0)?,
                }
            }
        })
    }

    /// The sample after step `index`, from the `prediction` of the picture or the noise at its
    /// beginning. `level` gives the level before each step and after the last.
    pub(super) fn step(
        &mut self,
        index: usize,
        level: &dyn Fn(usize) -> Result<Level>,
        prediction: &Tensor,
        sample: &Tensor,
        noise: Option<Tensor>,
    ) -> Result<Tensor> {
        if index == 0 {
            self.previous.clear();
        }
        let (from, to) = (level(index)?, level(index + 1)?);
        let order = self.order_of(index);
        let factors = self.factors(order, from, to)?;
        let mut next = times(factors.sample, sample)?.f_add(&times(factors.prediction, prediction)?)?;
        if order > 1 {
            let h = to.lambda - from.lambda;
            let before = level(index - 1)?;
            let ratio = (from.lambda - before.lambda) / h;
            let change = times(1.0 / ratio, &prediction.f_sub(&self.previous[0])?)?;
            if order == 2 {
                next = next.f_add(&times(factors.first, &change)?)?;
            } else {
                let earlier = (before.lambda - level(index - 2)?.lambda) / h;
                let change_before = times(1.0 / earlier, &self.previous[0].f_sub(&self.previous[1])?)?;
                let bend = change.f_sub(&change_before)?;
                let first = change.f_add(&times(ratio / (ratio + earlier), &bend)?)?;
                let second = times(1.0 / (ratio + earlier), &bend)?;
                next = next.f_add(&times(factors.first, &first)?)?.f_add(&times(factors.second, &second)?)?;
            }
        }
        if let Some(noise) = noise {
            next = next.f_add(&times(factors.noise, &noise)?)?;
        }
        self.previous.push_front(prediction.shallow_clone());
        self.previous.truncate(self.order - 1);
        self.next = index + 1;
        Ok(next)
    }
}
