//! UniPC: a multistep predictor whose result the next model output corrects (Zhao et al. 2023,
//! arXiv:2302.04867, algorithms 1 and 2).

use std::collections::VecDeque;

use serde::Deserialize;
use serde_json::json;
use squeeze_base::error::{Error, Result};
use squeeze_numerics::random::Generator;
use tch::Tensor;

use super::dpm;
use super::multistep::Level;
use super::noise::{NoiseSchedule, sigmas};
use super::sigmas::{FinalSigma, SigmaCurve, logarithms, sigma_at, timestep_of};
use super::spacing::{Spacing, SpacingKind};
use super::threshold::Threshold;
use super::{Prediction, Scheduler, check_index, over, times};
use crate::checkpoint::ConfigFile;

/// `solver_type`: the paper's B(h).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum SolverType {
    /// h.
    Bh1,
    /// eʰ - 1. The aliases are the names in other solvers; diffusers treats them as this one.
    #[serde(alias = "midpoint", alias = "heun", alias = "logrho")]
    Bh2,
}

/// diffusers' `UniPCMultistepScheduler`.
#[derive(Debug)]
pub(super) struct UniPc {
    timesteps: Vec<f64>,
    /// The noise before each step and after the last, relative to the picture.
    sigmas: Vec<f32>,
    prediction: Prediction,
    order: usize,
    solver: SolverType,
    /// Whether the picture is predicted, or the noise.
    of_picture: bool,
    threshold: Option<Threshold>,
    lower_order_final: bool,
    /// The steps whose result is not corrected.
    uncorrected: Vec<usize>,
    /// What the model predicted at the last steps, oldest first; at most `order`.
    outputs: VecDeque<Tensor>,
    /// The sample before the last step, corrected, and the order of this step.
    last: Option<(Tensor, usize)>,
    /// The index of the next step.
    next: usize,
}

impl UniPc {
    pub(super) fn new(file: &mut ConfigFile, noise: &NoiseSchedule, steps: usize) -> Result<Self> {
        let prediction = file.or("prediction_type", Prediction::Epsilon)?;
        let spacing = Spacing::read(file, SpacingKind::Linspace)?;
        let curve = SigmaCurve::read(file)?;
        let end = file.or("final_sigmas_type", FinalSigma::Zero)?;
        let order: usize = file.or("solver_order", 2)?;
        if !(1..=3).contains(&order) {
            return Err(file.error("solver_order", format!("= {order} is not supported (1, 2 and 3 are)")));
        }
        let solver = file.or("solver_type", SolverType::Bh2)?;
        let of_picture: bool = file.or("predict_x0", true)?;
        let lower_order_final: bool = file.or("lower_order_final", true)?;
        let uncorrected: Vec<usize> = file.or("disable_corrector", Vec::new())?;
        // Where the noise is predicted, diffusers has the key without effect.
        let threshold = Threshold::read(file)?.filter(|_| of_picture);
        for key in ["use_flow_sigmas", "use_dynamic_shifting"] {
            file.only(key, &[json!(false)])?;
        }
        file.only("solver_p", &[])?;
        file.only("shift_terminal", &[])?;
        // diffusers ends these in NaN.
        let endless = [
            ("solver_type", solver == SolverType::Bh1, "= bh1"),
            ("predict_x0", !of_picture, "= false"),
            ("lower_order_final", !lower_order_final && order > 1, "= false"),
        ];
        if let (FinalSigma::Zero, Some((key, _, value))) = (end, endless.into_iter().find(|(_, is_endless, _)| *is_endless)) {
            return Err(file.error(key, format!("{value} needs `final_sigmas_type: sigma_min`: a step to no noise is endless")));
        }

        let table = sigmas(&noise.positive_signal(file)?)?;
        let (max, min) = (f64::from(table[table.len() - 1]), f64::from(table[0]));
        let (timesteps, sigmas) = match curve.sigmas(max, min, steps) {
            Some(curved) => {
                let logs = logarithms(&table);
                let timesteps = curved.iter().map(|sigma| timestep_of(*sigma, &logs));
                // Where diffusers does not round, it truncates to whole numbers.
                let whole =
                    timesteps.map(|timestep| if curve.is_karras() { timestep.round_ties_even() } else { timestep.trunc() });
                (whole.collect(), curved)
            }
            None => {
                let timesteps: Vec<f64> = dpm::timesteps(&spacing, table.len(), table.len(), steps);
                let sigmas = timesteps.iter().map(|timestep| sigma_at(*timestep, &table)).collect();
                (timesteps, sigmas)
            }
        };
        let last = match (end, curve.is_trained()) {
            (FinalSigma::Zero, _) => 0.0,
            (FinalSigma::SigmaMin, true) => table[0],
            (FinalSigma::SigmaMin, false) => {
                let problem =
                    "= sigma_min makes a last step of length 0 with Karras, exponential or beta sigmas, which UniPC cannot take";
                return Err(file.error("final_sigmas_type", problem));
            }
        };
        let mut sigmas: Vec<f32> = sigmas.into_iter().map(|sigma| sigma as f32).collect();
        sigmas.push(last);
        if timesteps.is_empty() || sigmas.windows(2).any(|pair| pair[0] == pair[1]) {
            return Err(Error::Argument(format!(
                "{steps} UniPC steps do not fit into {} timesteps with this spacing; take fewer",
                table.len()
            )));
        }
        Ok(UniPc {
            timesteps,
            sigmas,
            prediction,
            order,
            solver,
            of_picture,
            threshold,
            lower_order_final,
            uncorrected,
            outputs: VecDeque::new(),
            last: None,
            next: 0,
        })
    }

    fn level(&self, index: usize) -> Result<Level> {
        Level::preserving(self.sigmas[index])
    }

    /// The prediction of the solver's kind that a model output makes.
    fn converted(&self, index: usize, model_output: &Tensor, sample: &Tensor) -> Result<Tensor> {
        let Level { signal, noise, .. } = self.level(index)?;
        let converted = match (self.of_picture, self.prediction) {
            (true, Prediction::Epsilon) => over(&sample.f_sub(&times(noise, model_output)?)?, signal),
            (true, Prediction::Sample) | (false, Prediction::Epsilon) => Ok(model_output.shallow_clone()),
            (true, Prediction::Velocity) => Ok(times(signal, sample)?.f_sub(&times(noise, model_output)?)?),
            (false, Prediction::Sample) => over(&sample.f_sub(&times(signal, model_output)?)?, noise),
            (false, Prediction::Velocity) => Ok(times(signal, model_output)?.f_add(&times(noise, sample)?)?),
        };
        match self.threshold {
            Some(threshold) => threshold.apply(&converted?),
            None => converted,
        }
    }

    /// The sample after the step from `index`, of the given order, from the sample before it.
    ///
    /// Without `new` this is the predictor. With `new`, the prediction at the end of the step, it
    /// is the corrector.
    fn advance(&self, index: usize, order: usize, sample: &Tensor, new: Option<&Tensor>) -> Result<Tensor> {
        let (from, to) = (self.level(index)?, self.level(index + 1)?);
        let latest = self.outputs.back().ok_or_else(|| Error::internal("a step without an output"))?;
        let h = to.lambda - from.lambda;
        let mut ratios = Vec::new();
        let mut differences = Vec::new();
        for back in 1..order {
            let earlier = &self.outputs[self.outputs.len() - 1 - back];
            let ratio = (self.level(index - back)?.lambda - from.lambda) / h;
            ratios.push(ratio);
            differences.push(over(&earlier.f_sub(latest)?, ratio)?);
        }
        ratios.push(1.0);
        let h = if self.of_picture { -h } else { h };
        let (scale, targets) = self.targets(h, order);
        let weights = match (new, order) {
            (None, 1) => Vec::new(),
            (None, 2) | (Some(_), 1) => vec![0.5],
            (None, _) => solve(&ratios[..order - 1], &targets[..order - 1]),
            (Some(_), _) => solve(&ratios, &targets),
        };
        if let Some(new) = new {
            differences.push(new.f_sub(latest)?);
        }
        let (kept, factor) =
            if self.of_picture { (to.noise / from.noise, to.signal) } else { (to.signal / from.signal, to.noise) };
        let mut next = times(kept, sample)?.f_sub(&times(factor * h.exp_m1(), latest)?)?;
        let terms = weights.iter().zip(&differences).map(|(weight, difference)| times(*weight, difference));
        let sum = terms.reduce(|sum, term| Ok(sum?.f_add(&term?)?)).transpose()?;
        if let Some(sum) = sum {
            next = next.f_sub(&times(factor * scale, &sum)?)?;
        }
        Ok(next.f_to_kind(sample.f_kind()?)?)
    }

    /// B(h), and the right sides of the equations for the weights.
    fn targets(&self, h: f32, order: usize) -> (f32, Vec<f32>) {
        let phi = h.exp_m1();
        let scale = match self.solver {
            SolverType::Bh1 => h,
            SolverType::Bh2 => phi,
        };
        let (mut phi_k, mut factorial) = (phi / h - 1.0, 1.0);
        let mut targets = Vec::new();
        for i in 1..=order {
            targets.push(phi_k * factorial / scale);
            factorial *= (i + 1) as f32;
            phi_k = phi_k / h - 1.0 / factorial;
        }
        (scale, targets)
    }
}

impl Scheduler for UniPc {
    fn timesteps(&self) -> &[f64] {
        &self.timesteps
    }

    fn step(&mut self, index: usize, model_output: &Tensor, sample: &Tensor, _: &mut Generator) -> Result<Tensor> {
        check_index(index, &self.timesteps)?;
        if index != 0 && index != self.next {
            return Err(Error::Argument(format!("step {index} out of order: the next is {}", self.next)));
        }
        if index == 0 {
            self.begin_at(0)?;
        }
        let output = self.converted(index, model_output, sample)?;
        let sample = match self.last.take() {
            Some((before, order)) if !self.uncorrected.contains(&(index - 1)) => {
                self.advance(index - 1, order, &before, Some(&output))?
            }
            _ => sample.shallow_clone(),
        };
        self.outputs.push_back(output);
        if self.outputs.len() > self.order {
            self.outputs.pop_front();
        }
        let most = if self.lower_order_final { self.timesteps.len() - index } else { self.order };
        let order = self.order.min(most).min(self.outputs.len());
        let next = self.advance(index, order, &sample, None)?;
        self.last = Some((sample, order));
        self.next = index + 1;
        Ok(next)
    }

    fn add_noise(&self, index: usize, picture: &Tensor, noise: &Tensor) -> Result<Tensor> {
        check_index(index, &self.timesteps)?;
        let level = self.level(index)?;
        Ok(times(level.signal, picture)?.f_add(&times(level.noise, noise)?)?)
    }

    fn begin_at(&mut self, index: usize) -> Result<()> {
        check_index(index, &self.timesteps)?;
        (self.last, self.next) = (None, index);
        self.outputs.clear();
        Ok(())
    }
}

/// The weights w for which Σ wⱼ·rⱼⁱ is the i-th target: a Vandermonde system, by elimination with
/// pivots.
fn solve(ratios: &[f32], targets: &[f32]) -> Vec<f32> {
    let n = ratios.len();
    let mut rows: Vec<Vec<f64>> = (0..n)
        .map(|i| {
            let powers = ratios.iter().map(|ratio| f64::from(ratio.powi(i as i32)));
            powers.chain([f64::from(targets[i])]).collect()
        })
        .collect();
    for column in 0..n {
        let pivot = (column..n).max_by(|a, b| rows[*a][column].abs().total_cmp(&rows[*b][column].abs())).unwrap_or(column);
        rows.swap(column, pivot);
        let pivot = rows[column].clone();
        for row in &mut rows[column + 1..] {
            let factor = row[column] / pivot[column];
            for (value, above) in row.iter_mut().zip(&pivot).skip(column) {
                *value -= factor * above;
            }
        }
    }
    let mut weights = vec![0.0; n];
    for row in (0..n).rev() {
        let rest: f64 = (row + 1..n).map(|k| rows[row][k] * weights[k]).sum();
        weights[row] = (rows[row][n] - rest) / rows[row][row];
    }
    weights.into_iter().map(|weight| weight as f32).collect()
}
