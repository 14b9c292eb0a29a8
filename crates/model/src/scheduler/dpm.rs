//! The multistep DPM-Solver and DPM-Solver++ on the noise levels of training.

use serde::Deserialize;
use serde_json::json;
use squeeze_base::error::{Error, Result};
use squeeze_numerics::random::Generator;
use tch::{Kind, Tensor};

use super::multistep::{Level, Multistep};
use super::noise::{NoiseSchedule, sigmas};
use super::sigmas::{FinalSigma, SigmaCurve, logarithms, sigma_at, timestep_of};
use super::spacing::{Spacing, SpacingKind, countdown, linspace, reversed};
use super::threshold::Threshold;
use super::{Prediction, Scheduler, check_index, over, times};
use crate::checkpoint::ConfigFile;

/// diffusers' `DPMSolverMultistepScheduler`.
#[derive(Debug)]
pub(super) struct DpmSolver {
    timesteps: Vec<f64>,
    /// The noise before each step and after the last, relative to the picture.
    sigmas: Vec<f32>,
    prediction: Prediction,
    threshold: Option<Threshold>,
    multistep: Multistep,
}

impl DpmSolver {
    pub(super) fn new(file: &mut ConfigFile, noise: &NoiseSchedule, steps: usize) -> Result<Self> {
        let prediction = file.or("prediction_type", Prediction::Epsilon)?;
        let spacing = Spacing::read(file, SpacingKind::Linspace)?;
        let curve = SigmaCurve::read(file)?.or_lu(file)?;
        let end = file.or("final_sigmas_type", FinalSigma::Zero)?;
        let threshold = Threshold::read(file)?;
        let solver = Multistep::read(file, end)?;
        if solver.is_of_noise() && end == FinalSigma::Zero {
            let problem = "= zero needs `algorithm_type: dpmsolver++` or `sde-dpmsolver++`, in diffusers too";
            return Err(file.error("final_sigmas_type", problem));
        }
        let lambda_min = lambda_min_clipped(file)?;
        file.only("use_flow_sigmas", &[json!(false)])?;
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
                let rounds = curve.is_rounded() && !noise.cosine;
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
        // Two equal sigmas would make the terms of higher order 0 / 0.
        if sigmas.is_empty() || solver.order() > 1 && sigmas.windows(2).any(|pair| pair[0] == pair[1]) {
            return Err(Error::Argument(format!(
                "{steps} DPM-Solver steps do not fit into {noisiest} timesteps with this spacing; take fewer"
            )));
        }
        sigmas.push(if end == FinalSigma::Zero { 0.0 } else { table[0] });
        let multistep = solver.for_steps(timesteps.len());
        Ok(DpmSolver { timesteps, sigmas, prediction, threshold, multistep })
    }

    /// The noise level before step `index`.
    fn level(&self, index: usize) -> Result<Level> {
        Level::preserving(self.sigmas[index])
    }

    /// The picture or the noise that a model output predicts, as the solver takes it.
    fn converted(&self, index: usize, model_output: &Tensor, sample: &Tensor) -> Result<Tensor> {
        let Level { signal, noise, .. } = self.level(index)?;
        let picture_of = |epsilon: &Tensor| over(&sample.f_sub(&times(noise, epsilon)?)?, signal);
        let noise_of = |picture: &Tensor| over(&sample.f_sub(&times(signal, picture)?)?, noise);
        if !self.multistep.is_of_noise() {
            let picture = match self.prediction {
                Prediction::Epsilon => picture_of(model_output)?,
                Prediction::Sample => model_output.shallow_clone(),
                Prediction::Velocity => times(signal, sample)?.f_sub(&times(noise, model_output)?)?,
            };
            return self.threshold.map_or(Ok(picture.shallow_clone()), |threshold| threshold.apply(&picture));
        }
        let epsilon = match self.prediction {
            Prediction::Epsilon => model_output.shallow_clone(),
            Prediction::Sample => noise_of(model_output)?,
            Prediction::Velocity => times(signal, model_output)?.f_add(&times(noise, sample)?)?,
        };
        match self.threshold {
            Some(threshold) => noise_of(&threshold.apply(&picture_of(&epsilon)?)?),
            None => Ok(epsilon),
        }
    }
}

impl Scheduler for DpmSolver {
    fn timesteps(&self) -> &[f64] {
        &self.timesteps
    }

    fn step(&mut self, index: usize, model_output: &Tensor, sample: &Tensor, generator: &mut Generator) -> Result<Tensor> {
        self.multistep.check(index)?;
        let output = self.converted(index, model_output, sample)?;
        let noise = self.multistep.noise(sample, Kind::Float, generator)?;
        let sigmas = &self.sigmas;
        let level = |index: usize| Level::preserving(sigmas[index]);
        let next = self.multistep.step(index, &level, &output, &sample.f_to_kind(Kind::Float)?, noise)?;
        Ok(next.f_to_kind(output.f_kind()?)?)
    }

    fn add_noise(&self, index: usize, picture: &Tensor, noise: &Tensor) -> Result<Tensor> {
        check_index(index, &self.timesteps)?;
        let level = self.level(index)?;
        Ok(times(level.signal, picture)?.f_add(&times(level.noise, noise)?)?)
    }

    fn begin_at(&mut self, index: usize) -> Result<()> {
        check_index(index, &self.timesteps)?;
        self.multistep.begin_at(index);
        Ok(())
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
pub(super) fn timesteps(spacing: &Spacing, noisiest: usize, train: usize, steps: usize) -> Vec<f64> {
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
