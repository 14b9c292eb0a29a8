//! The pseudo linear multistep method (Liu et al. 2022, arXiv:2202.09778, PNDM without its
//! Runge-Kutta steps).

use std::collections::VecDeque;

use squeeze_base::error::{Error, Result};
use squeeze_numerics::random::Generator;
use tch::Tensor;

use super::noise::NoiseSchedule;
use super::spacing::{Spacing, SpacingKind};
use super::{Prediction, Scheduler, check_index, mixed, over, sqrt, times};
use crate::checkpoint::ConfigFile;

/// diffusers' `PNDMScheduler` with `skip_prk_steps`.
#[derive(Debug)]
pub(super) struct Plms {
    /// Of each call of the model: the second timestep is visited twice.
    timesteps: Vec<f64>,
    /// ᾱ of every training timestep.
    table: Vec<f32>,
    /// ᾱ after the last step.
    last: f32,
    /// Training timesteps that a step goes down.
    stride: usize,
    prediction: Prediction,
    /// The model's last outputs, oldest first; at most four.
    outputs: VecDeque<Tensor>,
    /// The sample before the first step, until the second call has repeated this step.
    first: Option<Tensor>,
    /// The index of the first step, and of the next.
    begin: usize,
    next: usize,
}

impl Plms {
    pub(super) fn new(file: &mut ConfigFile, noise: &NoiseSchedule, steps: usize) -> Result<Self> {
        let prediction = file.or("prediction_type", Prediction::Epsilon)?;
        if prediction == Prediction::Sample {
            return Err(file.error("prediction_type", "= sample is not supported by this class, in diffusers neither"));
        }
        let spacing = Spacing::read(file, SpacingKind::Leading)?;
        let ends_at_one: bool = file.or("set_alpha_to_one", false)?;
        if !file.or("skip_prk_steps", false)? {
            let problem = "= false, which begins with Runge-Kutta steps, is not supported; Stable Diffusion's own configs have true, \
                           which `--scheduler plms` sets, and other samplers do without";
            return Err(file.error("skip_prk_steps", problem));
        }
        let table = noise.signal()?;
        let last = if ends_at_one { 1.0 } else { table[0] };
        let stride = table.len() / steps;
        let whole = spacing.whole_timesteps(table.len(), steps)?;
        // The second call repeats the first step with the mean of both outputs.
        let mut timesteps = whole.clone();
        if let Some(&second) = whole.get(1) {
            timesteps.insert(1, second);
        }
        for (index, &timestep) in timesteps.iter().enumerate() {
            let from = if index == 1 { timestep + stride } else { timestep };
            let Some(&before) = table.get(from) else {
                return Err(Error::Argument(format!(
                    "{steps} PLMS steps spaced this way reach timestep {from}, which does not exist; take one more or less"
                )));
            };
            if before <= 0.0 {
                return Err(file.error("beta_schedule", format!("leaves nothing of the picture at timestep {from}")));
            }
        }
        let timesteps = timesteps.into_iter().map(|timestep| timestep as f64).collect();
        Ok(Plms { timesteps, table, last, stride, prediction, outputs: VecDeque::new(), first: None, begin: 0, next: 0 })
    }

    /// ᾱ before and after the step of call `index`. The second call of a run repeats its first
    /// step.
    ///
    /// As in diffusers, a run that begins later than at the first timestep takes its second call
    /// for the repetition too, though the timesteps list this one only at their beginning: from
    /// then on the sample has the noise of one step more than the timestep says.
    fn signal(&self, index: usize) -> (f32, f32) {
        let timestep = self.timesteps[index] as usize;
        if index == self.begin + 1 {
            return (self.table[timestep + self.stride], self.table[timestep]);
        }
        (self.table[timestep], timestep.checked_sub(self.stride).map_or(self.last, |to| self.table[to]))
    }

    /// The outputs so far, weighed as by Adams and Bashforth.
    fn combined(&self) -> Result<Tensor> {
        let weigh = |weights: &[f64], divisor: f64| -> Result<Tensor> {
            let terms = weights.iter().zip(self.outputs.iter().rev());
            let sum = terms.map(|(weight, output)| output.f_mul_scalar(*weight)).reduce(|sum, term| sum?.f_add(&term?));
            Ok(sum.ok_or_else(|| Error::internal("a step without an output"))??.f_div_scalar(divisor)?)
        };
        match self.outputs.len() {
            0 | 1 => weigh(&[1.0], 1.0),
            2 => weigh(&[3.0, -1.0], 2.0),
            3 => weigh(&[23.0, -16.0, 5.0], 12.0),
            _ => weigh(&[55.0, -59.0, 37.0, -9.0], 24.0),
        }
    }
}

impl Scheduler for Plms {
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
        if index == self.begin {
            self.first = Some(sample.shallow_clone());
        }
        let repeated = if index == self.begin + 1 { self.first.take() } else { None };
        let (output, sample) = match (repeated, self.outputs.back()) {
            (Some(first), Some(output)) => (model_output.f_add(output)?.f_div_scalar(2.0)?, first),
            _ => {
                self.outputs.push_back(model_output.shallow_clone());
                if self.outputs.len() > 4 {
                    self.outputs.pop_front();
                }
                (self.combined()?, sample.shallow_clone())
            }
        };
        let (before, after) = self.signal(index);
        let output = match self.prediction {
            Prediction::Epsilon | Prediction::Sample => output,
            Prediction::Velocity => times(sqrt(before)?, &output)?.f_add(&times(sqrt(1.0 - before)?, &sample)?)?,
        };
        let divisor = before * sqrt(1.0 - after)? + sqrt(before * (1.0 - before) * after)?;
        let change = over(&times(after - before, &output)?, divisor)?;
        self.next = index + 1;
        Ok(times(sqrt(after / before)?, &sample)?.f_sub(&change)?)
    }

    fn add_noise(&self, index: usize, picture: &Tensor, noise: &Tensor) -> Result<Tensor> {
        check_index(index, &self.timesteps)?;
        mixed(self.table[self.timesteps[index] as usize], picture, noise)
    }

    fn begin_at(&mut self, index: usize) -> Result<()> {
        check_index(index, &self.timesteps)?;
        (self.begin, self.next, self.first) = (index, index, None);
        self.outputs.clear();
        Ok(())
    }
}
