//! Gradients of the UNet's output by the output of each layer.

use std::path::Path;

use sdxl_model::unet::{Carry, Part, PartName, Scope};
use sdxl_model::{Layer, Observer, Unobserved};
use squeeze_base::error::Result;
use squeeze_base::progress::{Progress, Task};
use squeeze_numerics::one_thread::OneThread;
use squeeze_numerics::random::noise;
use squeeze_numerics::sum;
use tch::{Kind, Tensor};

use super::gather::Gatherer;
use super::job::{Calibration, Job, Machine};
use super::propagate::Extent;
use super::walk::Walk;
use crate::calibration::Samples;
use crate::plan::{CarriesIn, Plan};
use crate::recipe::Devices;

/// Called with the name of a layer and the gradient of its output.
pub(super) type Visit<'a> = &'a mut dyn FnMut(&str, &Tensor) -> Result<()>;

/// What was measured besides the gradients.
#[derive(Debug, Clone, Copy)]
pub(super) struct Probed {
    /// The number of samples.
    pub count: usize,
    /// The mean over the samples of the squared norm of the UNet's output.
    pub energy: f64,
}

/// Sends a random vector v back through the dense UNet on `probes` of the samples, at most, and
/// calls `visit` with J^T v of each layer: J is the Jacobian of the UNet's output by the layer's
/// output (Hutchinson 1990).
///
/// It goes block by block, so that the activations of one block are in memory at a time.
pub(super) fn output_gradients(
    (job, probes): (&Job<'_>, usize),
    folder: &Path,
    progress: &dyn Progress,
    visit: Visit<'_>,
) -> Result<Probed> {
    // One thread, so that the sums do not depend on their number.
    let _one = OneThread::begin();
    let task = Task::begin(progress, "effects on the output", "parts", 2 * job.model.chain.stages().len() + 2);
    let device = job.machine.devices.first();
    let (samples, total) = (&job.calibration.samples.calls, job.calibration.samples.calls.len());
    let count = probes.min(total);
    let placed = |k: usize| samples[(2 * k + 1) * total / (2 * count)].placed(job.machine.placement(device));
    let calls = (0..count).map(placed).collect::<Result<Vec<_>>>()?;
    // Weights of 1 keep the probes apart.
    let (samples, weights) = (Samples { calls, notes: Vec::new() }, vec![1.0; count]);
    let (devices, plan) = (Devices::from(device), Plan { carries: CarriesIn::Memory, ..job.plan.clone() });
    let probe_job = Job {
        plan: &plan,
        calibration: Calibration { samples: &samples, weights: &weights, ..job.calibration },
        machine: Machine { devices: &devices, ..job.machine },
        ..*job
    };
    let mut walk = Walk::new(&probe_job, Gatherer::default(), folder, progress)?;
    walk.begin(&[], None)?;
    let mut before = Vec::new();
    let stages: Vec<PartName> = job.model.chain.parts().filter(|part| matches!(part, PartName::Stage(_))).collect();
    for stage in &stages {
        task.go_on()?;
        task.advance(&stage.to_string());
        before.push(walk.carries()?);
        walk.advance(*stage, Scope::Whole, Extent::All, None)?;
    }

    let mut energy = 0.0;
    task.advance(&PartName::OutputBlock.to_string());
    let output_block = job.model.chain.load_part(PartName::OutputBlock, job.model.source)?;
    let mut gradients = Vec::new();
    for (number, carry) in walk.carries()?.iter().enumerate() {
        let carry = carry.as_leaves()?;
        let mut outputs = Outputs::default();
        let output = output_block.forward(Scope::Whole, carry.shallow_clone(), &mut outputs)?.hidden_states;
        energy += squares(&output)? / count as f64;
        let probe = noise(&output.size(), number as u64, Kind::Float)?.f_to_device(device)?;
        let along = output.f_to_kind(Kind::Float)?.f_mul(&probe)?.f_sum(Kind::Float)?;
        let mut of_carry = outputs.backward(&[along], vec![carry.hidden_states], visit)?;
        gradients.push(Gradient { hidden_states: of_carry.remove(0), tokens: None, residuals: Vec::new(), temb: None });
    }
    drop(walk);
    for (name, before) in stages.iter().zip(before).rev() {
        task.go_on()?;
        task.advance(&name.to_string());
        let stage = job.model.chain.load_part(*name, job.model.source)?;
        for (carry, gradient) in before.into_iter().zip(&mut gradients) {
            backward(&stage, carry, gradient, visit)?;
        }
    }
    task.go_on()?;
    task.advance(&PartName::InputBlock.to_string());
    let input_block = job.model.chain.load_input_block(job.model.source)?;
    for (call, gradient) in samples.calls.iter().zip(&gradients) {
        let mut outputs = Outputs::default();
        let carry = input_block.forward(&call.sample, call.timestep, &call.conditioning, &mut outputs)?;
        let along = gradient.along(&carry)?;
        outputs.backward(&along, Vec::new(), visit)?;
    }
    Ok(Probed { count, energy })
}

/// The gradient with respect to each tensor of a carry; `None` where the output does not depend on
/// it.
struct Gradient {
    hidden_states: Option<Tensor>,
    tokens: Option<Tensor>,
    residuals: Vec<Option<Tensor>>,
    temb: Option<Tensor>,
}

impl Gradient {
    /// The scalar products with a carry's tensors, whose gradient is to be found.
    fn along(&self, carry: &Carry) -> Result<Vec<Tensor>> {
        let tensors = [Some(&carry.hidden_states), carry.tokens.as_ref(), Some(&carry.temb)].into_iter();
        let gradients = [&self.hidden_states, &self.tokens, &self.temb].into_iter();
        let residuals = carry.down_block_res_samples.iter().map(Some).zip(&self.residuals);
        let pairs = tensors.zip(gradients).chain(residuals);
        let product = |(tensor, gradient): (Option<&Tensor>, &Option<Tensor>)| match (tensor, gradient) {
            (Some(tensor), Some(gradient)) if tensor.requires_grad() => {
                Some(tensor.f_mul(gradient).and_then(|product| product.f_sum(Kind::Float)))
            }
            (_, _) => None,
        };
        Ok(pairs.filter_map(product).collect::<Result<_, _>>()?)
    }
}

/// Backpropagates through a stage, and calls `visit` for each layer.
fn backward(stage: &Part, carry: Carry, gradient: &mut Gradient, visit: Visit<'_>) -> Result<()> {
    let mut inputs = Vec::new();
    let mut carry = carry;
    for block in 0..stage.blocks() {
        let mut after = stage.forward(Scope::Block(block), carry.shallow_clone(), &mut Unobserved)?;
        if carry.kind()? == Kind::Half && !after.is_finite()? {
            carry = carry.beyond_half()?;
            after = stage.forward(Scope::Block(block), carry.shallow_clone(), &mut Unobserved)?;
        }
        inputs.push(carry);
        carry = after.fitted()?;
    }
    drop(carry);
    for (block, carry) in inputs.into_iter().enumerate().rev() {
        backward_block(stage, block, carry.as_leaves()?, gradient, visit)?;
    }
    Ok(())
}

fn backward_block(stage: &Part, block: usize, carry: Carry, gradient: &mut Gradient, visit: Visit<'_>) -> Result<()> {
    let mut outputs = Outputs::default();
    let after = stage.forward(Scope::Block(block), carry.shallow_clone(), &mut outputs)?;
    let along = gradient.along(&after)?;
    let (tokens, residuals) = (carry.tokens.is_some(), carry.down_block_res_samples.len());
    let mut inputs = vec![carry.hidden_states, carry.temb];
    inputs.extend(carry.tokens);
    inputs.extend(carry.down_block_res_samples);
    let mut gradients = outputs.backward(&along, inputs, visit)?.into_iter();
    gradient.hidden_states = gradients.next().flatten();
    gradient.temb = gradients.next().flatten();
    gradient.tokens = if tokens { gradients.next().flatten() } else { None };
    gradient.residuals = gradients.take(residuals).collect();
    Ok(())
}

fn squares(tensor: &Tensor) -> Result<f64> {
    sum::squares(&tensor.f_detach()?.f_to_kind(Kind::Float)?)
}

/// Keeps the outputs that depend on the graph's leaves.
#[derive(Default)]
struct Outputs(Vec<(String, Tensor)>);

impl Outputs {
    /// Backpropagates the sum of `along`. Calls `visit` for each layer that it depends on,
    /// and returns the gradient of each of `inputs`.
    fn backward(self, along: &[Tensor], inputs: Vec<Tensor>, visit: Visit<'_>) -> Result<Vec<Option<Tensor>>> {
        let of_inputs = inputs.len();
        let all: Vec<Tensor> = inputs.into_iter().chain(self.0.iter().map(|(_, output)| output.shallow_clone())).collect();
        let gradients = Tensor::f_run_backward(along, &all, false, false)?;
        let mut gradients = gradients.into_iter().map(|gradient| Some(gradient).filter(Tensor::defined));
        let of_inputs = gradients.by_ref().take(of_inputs).collect();
        for ((name, _), gradient) in self.0.iter().zip(gradients) {
            if let Some(gradient) = gradient {
                visit(name, &gradient)?;
            }
        }
        Ok(of_inputs)
    }
}

impl Observer for Outputs {
    fn input(&mut self, _layer: &Layer, _input: &Tensor) -> Result<()> {
        Ok(())
    }

    fn output(&mut self, layer: &Layer, output: &Tensor) -> Result<()> {
        // Projections of text and time have no differentiable input here; their outputs become
        // leaves.
        if !output.requires_grad() {
            let _ = output.shallow_clone().f_requires_grad_(true)?;
        }
        self.0.push((layer.name().to_owned(), output.shallow_clone()));
        Ok(())
    }
}
