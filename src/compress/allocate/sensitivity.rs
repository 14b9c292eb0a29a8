//! How far an error in a layer's output reaches.

use std::collections::BTreeMap;

use tch::{Kind, Tensor};

use super::super::{Job, placement};
use crate::calibration::Samples;
use crate::error::Result;
use crate::model::unet::{Carry, Stage};
use crate::model::{Layer, Observer, Unobserved};
use crate::progress::{Progress, Task};
use crate::random::noise;
use crate::sum;

/// What each layer's output error does to the UNet's output.
#[derive(Debug, Default)]
pub(super) struct Sensitivities {
    /// By name: squared error of the UNet's output for one of the layer's.
    pub by_layer: BTreeMap<String, f64>,
    /// The UNet's output, squared, for one call.
    pub energy: f64,
}

impl Job<'_> {
    /// Measures, on `probes` of the samples, ‖J‖² / n of each layer: J the Jacobian of the UNet's output by the layer's, n the numbers in the
    /// layer's output. An error that is spread evenly there is multiplied by that. By backpropagation of a random vector (Hutchinson
    /// 1990), unit by unit, so that one unit's activations are in memory at a time.
    pub(super) fn sensitivities(&self, samples: &Samples, probes: usize, progress: &dyn Progress) -> Result<Sensitivities> {
        let _one = OneThread::begin();
        let count = probes.min(samples.calls.len());
        let calls: Vec<_> = (0..count).map(|k| &samples.calls[(2 * k + 1) * samples.calls.len() / (2 * count)]).collect();
        let task = Task::begin(progress, "sensitivities", "parts", 2 * self.chain.stages().len() + 1);
        let placement = placement(self.devices[0], self.kind);

        let head = self.chain.load_head(self.source)?;
        let mut carries = Vec::new();
        for call in calls {
            let call = call.placed(placement)?;
            carries.push(head.forward(&call.sample, call.timestep, &call.conditioning, &mut Unobserved)?);
        }
        let mut before = Vec::new();
        for spec in self.chain.stages() {
            task.go_on()?;
            task.advance(&spec.name().to_string());
            let stage = spec.load(self.source)?;
            let after =
                carries.iter().map(|carry| stage.forward(carry.shallow_clone(), &mut Unobserved)).collect::<Result<_>>()?;
            before.push(std::mem::replace(&mut carries, after));
        }

        let mut found = Sensitivities::default();
        task.advance("tail");
        let tail = self.chain.load_tail(self.source)?;
        let mut gradients = Vec::new();
        for (number, carry) in carries.iter().enumerate() {
            let carry = leaf(carry)?;
            let output = tail.forward(&carry, &mut Unobserved)?;
            found.energy += squares(&output)? / count as f64;
            let probe = noise(&output.size(), number as u64, Kind::Float)?.f_to_device(placement.device)?;
            let along = output.f_to_kind(Kind::Float)?.f_mul(&probe)?.f_sum(Kind::Float)?;
            let gradient = Tensor::f_run_backward(&[along], std::slice::from_ref(&carry.hidden_states), false, false)?;
            gradients.push(Gradient { hidden_states: gradient.into_iter().next(), tokens: None, residuals: Vec::new() });
        }
        for (spec, before) in self.chain.stages().iter().zip(before).rev() {
            task.go_on()?;
            task.advance(&spec.name().to_string());
            let stage = spec.load(self.source)?;
            for (carry, gradient) in before.into_iter().zip(&mut gradients) {
                backward(&stage, carry, gradient, &mut found.by_layer, 1.0 / count as f64)?;
            }
        }
        Ok(found)
    }
}

/// libtorch works on one thread until this is dropped. Its gradients depend on the number of threads: those of SiLU, and of products with
/// few rows. Each probe is a forward and a backward, so the time is small beside that of the curves.
struct OneThread(i32);

impl OneThread {
    fn begin() -> Self {
        let threads = tch::get_num_threads();
        tch::set_num_threads(1);
        OneThread(threads)
    }
}

impl Drop for OneThread {
    fn drop(&mut self) {
        tch::set_num_threads(self.0);
    }
}

/// The gradient by each tensor of a carry.
struct Gradient {
    hidden_states: Option<Tensor>,
    tokens: Option<Tensor>,
    residuals: Vec<Tensor>,
}

/// Goes back through a stage, and adds each layer's share.
fn backward(
    stage: &Stage,
    carry: Carry,
    gradient: &mut Gradient,
    by_layer: &mut BTreeMap<String, f64>,
    share: f64,
) -> Result<()> {
    let mut before = Vec::new();
    let mut carry = carry;
    for unit in 0..stage.units() {
        before.push(carry.shallow_clone());
        carry = stage.forward_unit(unit, carry, &mut Unobserved)?;
    }
    drop(carry);
    for unit in (0..stage.units()).rev() {
        let Some(carry) = before.pop() else { break };
        let carry = leaf(&carry)?;
        let mut outputs = Outputs::default();
        let after = stage.forward_unit(unit, carry.shallow_clone(), &mut outputs)?;
        let mut along = Vec::new();
        let mut add = |tensor: &Tensor, gradient: &Tensor| -> Result<()> {
            along.push(tensor.f_mul(gradient)?.f_sum(Kind::Float)?);
            Ok(())
        };
        if let Some(gradient) = &gradient.hidden_states {
            add(&after.hidden_states, gradient)?;
        }
        if let (Some(tokens), Some(gradient)) = (&after.tokens, &gradient.tokens) {
            add(tokens, gradient)?;
        }
        for (residual, gradient) in after.down_block_res_samples.iter().zip(&gradient.residuals) {
            add(residual, gradient)?;
        }
        let mut inputs = vec![carry.hidden_states.shallow_clone()];
        inputs.extend(carry.tokens.iter().map(Tensor::shallow_clone));
        inputs.extend(carry.down_block_res_samples.iter().map(Tensor::shallow_clone));
        let of_carry = inputs.len();
        inputs.extend(outputs.0.iter().map(|(_, output)| output.shallow_clone()));
        let mut found = Tensor::f_run_backward(&along, &inputs, false, false)?;
        for ((name, output), gradient) in outputs.0.iter().zip(found.split_off(of_carry)) {
            *by_layer.entry(name.clone()).or_default() += share * squares(&gradient)? / output.numel().max(1) as f64;
        }
        let mut found = found.into_iter();
        gradient.hidden_states = found.next();
        gradient.tokens = if carry.tokens.is_some() { found.next() } else { None };
        gradient.residuals = found.collect();
    }
    Ok(())
}

/// The same carry, its tensors the leaves of a new graph.
fn leaf(carry: &Carry) -> Result<Carry> {
    let leaf = |tensor: &Tensor| -> Result<Tensor> { Ok(tensor.f_detach()?.f_set_requires_grad(true)?) };
    Ok(Carry {
        hidden_states: leaf(&carry.hidden_states)?,
        tokens: carry.tokens.as_ref().map(leaf).transpose()?,
        down_block_res_samples: carry.down_block_res_samples.iter().map(leaf).collect::<Result<_>>()?,
        temb: carry.temb.shallow_clone(),
        encoder_hidden_states: carry.encoder_hidden_states.shallow_clone(),
    })
}

fn squares(tensor: &Tensor) -> Result<f64> {
    sum::squares(&tensor.f_detach()?.f_to_kind(Kind::Float)?)
}

/// Keeps the outputs that depend on the graph's leaves.
#[derive(Default)]
struct Outputs(Vec<(String, Tensor)>);

impl Observer for Outputs {
    fn input(&mut self, _layer: &Layer, _input: &Tensor) -> Result<()> {
        Ok(())
    }

    fn output(&mut self, layer: &Layer, output: &Tensor) -> Result<()> {
        // What text and time go through has no gradient of its own: its leaves would be theirs.
        if !output.requires_grad() {
            let _ = output.shallow_clone().f_requires_grad_(true)?;
        }
        self.0.push((layer.name().to_owned(), output.shallow_clone()));
        Ok(())
    }
}
