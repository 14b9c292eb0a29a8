//! DPM-Solver++ of first and second order, multistep (Lu et al. 2022, arXiv:2211.01095, algorithm
//! 2).

use serde::Deserialize;
use serde_json::json;
use squeeze_base::error::{Error, Result};
use tch::{Kind, Tensor};

use super::noise::{NoiseSchedule, sigmas};
use super::sigmas::{FinalSigma, SigmaCurve, logarithms, sigma_at, timestep_of};
use super::spacing::{Spacing, SpacingKind, countdown, linspace, reversed};
use super::{Prediction, Scheduler, check_index, exp, log, over, sqrt, times};
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

/// diffusers' `DPMSolverMultistepScheduler` with `algorithm_type` "dpmsolver++".
#[derive(Debug)]
pub(super) struct DpmSolver {
    timesteps: Vec<f64>,
    /// The noise before each step and after the last, relative to the picture.
    sigmas: Vec<f32>,
    prediction: Prediction,
    order: usize,
    solver: SolverType,
    /// Whether the last step is of first order.
    first_order_last: bool,
    /// The index of the next step.
    next: usize,
    /// The picture that the previous step predicted.
    previous: Option<Tensor>,
}

impl DpmSolver {
    pub(super) fn new(file: &mut ConfigFile, noise: &NoiseSchedule, steps: usize) -> Result<Self> {
        let prediction = file.or("prediction_type", Prediction::Epsilon)?;
        let spacing = Spacing::read(file, SpacingKind::Linspace)?;
        let curve = SigmaCurve::read(file)?;
        let end = file.or("final_sigmas_type", FinalSigma::Zero)?;
        let order: usize = file.or("solver_order", 2)?;
        if !(1..=2).contains(&order) {
            return Err(file.error("solver_order", format!("= {order} is not supported (1 and 2 are)")));
        }
        let solver = file.or("solver_type", SolverType::Midpoint)?;
        let lower_order_final: bool = file.or("lower_order_final", true)?;
        let euler_at_final: bool = file.or("euler_at_final", false)?;
        let lambda_min = lambda_min_clipped(file)?;
        // diffusers treats "deis" as "dpmsolver++", but refuses a final sigma of zero with it.
        let names = [json!("dpmsolver++"), json!("deis")];
        file.only("algorithm_type", if end == FinalSigma::Zero { &names[..1] } else { &names })?;
        for key in ["thresholding", "use_lu_lambdas", "use_flow_sigmas"] {
            file.only(key, &[json!(false)])?;
        }
        file.only("variance_type", &[])?;

        let signal = noise.positive_signal(file)?;
        let table = sigmas(&signal)?;
        let logs = logarithms(&table);
        let noisiest = usable(&signal, lambda_min)?;
        if noisiest == 0 {
            return Err(file.error("lambda_min_clipped", format!("= {lambda_min} leaves no timestep")));
        }
        let (max, min) = (f64::from(table[table.len() - 1]), f64::from(table[0]));
        let (timesteps, sigmas) = match curve.sigmas(max, min, steps) {
            Some(curved) => {
                let timesteps = curved.iter().map(|sigma| timestep_of(*sigma, &logs));
                let rounds = curve.is_karras() && !noise.cosine;
                // Where diffusers does not round, it truncates to whole numbers.
                let whole = timesteps.map(|timestep| if rounds { timestep.round_ties_even() } else { timestep.trunc() });
                (whole.collect(), curved)
            }
            None => {
                let timesteps = timesteps(&spacing, noisiest, table.len(), steps);
                let sigmas = timesteps.iter().map(|timestep| sigma_at(*timestep, &table)).collect();
                (timesteps, sigmas)
            }
        };
        let mut sigmas: Vec<f32> = sigmas.into_iter().map(|sigma| sigma as f32).collect();
        // Two equal sigmas would make the second-order term 0 / 0.
        if sigmas.is_empty() || order == 2 && sigmas.windows(2).any(|pair| pair[0] == pair[1]) {
            return Err(Error::Argument(format!(
                "{steps} DPM-Solver steps do not fit into {noisiest} timesteps with this spacing; take fewer"
            )));
        }
        sigmas.push(if end == FinalSigma::Zero { 0.0 } else { table[0] });
        let first_order_last = euler_at_final || lower_order_final && timesteps.len() < 15 || end == FinalSigma::Zero;
        Ok(DpmSolver { timesteps, sigmas, prediction, order, solver, first_order_last, next: 0, previous: None })
    }

    /// The picture that a model output predicts.
    fn picture(&self, index: usize, model_output: &Tensor, sample: &Tensor) -> Result<Tensor> {
        let Level { signal, noise, .. } = Level::of(self.sigmas[index])?;
        match self.prediction {
            Prediction::Epsilon => over(&sample.f_sub(&times(noise, model_output)?)?, signal),
            Prediction::Sample => Ok(model_output.shallow_clone()),
            Prediction::Velocity => Ok(times(signal, sample)?.f_sub(&times(noise, model_output)?)?),
        }
    }
}

impl Scheduler for DpmSolver {
    fn timesteps(&self) -> &[f64] {
        &self.timesteps
    }

    fn step(&mut self, index: usize, model_output: &Tensor, sample: &Tensor) -> Result<Tensor> {
        check_index(index, &self.timesteps)?;
        if index != 0 && index != self.next {
            return Err(Error::Argument(format!("step {index} out of order: the next is {}", self.next)));
        }
        let picture = self.picture(index, model_output, sample)?;
        let sample = sample.f_to_kind(Kind::Float)?;
        let (from, to) = (Level::of(self.sigmas[index])?, Level::of(self.sigmas[index + 1])?);
        let h = to.lambda - from.lambda;
        let decay = exp(-h)? - 1.0;
        let mut next = times(to.noise / from.noise, &sample)?.f_sub(&times(to.signal * decay, &picture)?)?;

        let previous = if index == 0 { None } else { self.previous.as_ref() };
        let is_last = index + 1 == self.timesteps.len();
        if let Some(previous) = previous
            && self.order == 2
            && !(is_last && self.first_order_last)
        {
            let ratio = (from.lambda - Level::of(self.sigmas[index - 1])?.lambda) / h;
            let change = times(1.0 / ratio, &picture.f_sub(previous)?)?;
            next = match self.solver {
                SolverType::Midpoint => next.f_sub(&times(0.5 * (to.signal * decay), &change)?)?,
                SolverType::Heun => next.f_add(&times(to.signal * (decay / h + 1.0), &change)?)?,
            };
        }
        let next = next.f_to_kind(picture.f_kind()?)?;
        self.previous = Some(picture);
        self.next = index + 1;
        Ok(next)
    }

    fn add_noise(&self, index: usize, picture: &Tensor, noise: &Tensor) -> Result<Tensor> {
        check_index(index, &self.timesteps)?;
        let level = Level::of(self.sigmas[index])?;
        Ok(times(level.signal, picture)?.f_add(&times(level.noise, noise)?)?)
    }

    fn begin_at(&mut self, index: usize) -> Result<()> {
        check_index(index, &self.timesteps)?;
        (self.next, self.previous) = (index, None);
        Ok(())
    }
}

/// A noise level in the variance-preserving view that the solver works in.
struct Level {
    /// The factor of the picture (α).
    signal: f32,
    /// The factor of the noise (σ).
    noise: f32,
    /// Half the logarithm of the signal-to-noise ratio.
    lambda: f32,
}

impl Level {
    fn of(sigma: f32) -> Result<Self> {
        let signal = 1.0 / sqrt(sigma * sigma + 1.0)?;
        let noise = sigma * signal;
        Ok(Level { signal, noise, lambda: log(signal)? - log(noise)? })
    }
}

/// `lambda_min_clipped`, which is -∞ unless it is set.
fn lambda_min_clipped(file: &mut ConfigFile) -> Result<f32> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Number {
        Finite(f32),
        Infinite(String),
    }
    match file.optional("lambda_min_clipped")? {
        None => Ok(f32::NEG_INFINITY),
        Some(Number::Finite(lambda)) => Ok(lambda),
        Some(Number::Infinite(word)) if word == "-Infinity" => Ok(f32::NEG_INFINITY),
        Some(Number::Infinite(word)) => Err(file.error("lambda_min_clipped", format!("= {word:?} is not a number to clip at"))),
    }
}

/// The number of training timesteps with a λ of at least `lambda_min`. These are the first ones,
/// because λ falls with the timestep.
fn usable(signal: &[f32], lambda_min: f32) -> Result<usize> {
    let log_root = |values: &[f32]| -> Result<Tensor> { Ok(Tensor::f_from_slice(values)?.f_sqrt()?.f_log()?) };
    let noise: Vec<f32> = signal.iter().map(|alpha| 1.0 - alpha).collect();
    let lambdas: Vec<f32> = Vec::try_from(&log_root(signal)?.f_sub(&log_root(&noise)?)?)?;
    Ok(lambdas.len() - lambdas.iter().rev().take_while(|lambda| **lambda < lambda_min).count())
}

/// The timesteps visited, noisiest first. Unlike in Euler and DDIM, the spacings linspace and
/// leading are computed for `steps + 1` timesteps, of which the cleanest is left out.
fn timesteps(spacing: &Spacing, noisiest: usize, train: usize, steps: usize) -> Vec<f64> {
    match spacing.kind {
        SpacingKind::Linspace => {
            let line = linspace(0.0, noisiest as f64 - 1.0, steps + 1);
            reversed(line).into_iter().take(steps).map(f64::round_ties_even).collect()
        }
        SpacingKind::Leading => {
            let stride = noisiest / (steps + 1);
            (1..=steps).rev().map(|i| (i * stride + spacing.offset) as f64).collect()
        }
        SpacingKind::Trailing => countdown(noisiest, train, steps),
    }
}
