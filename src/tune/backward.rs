//! The gradient of all parameters, part by part and unit by unit.
//!
//! The forward keeps the input of each unit (gradient checkpointing: Chen et al. 2016). The
//! backward makes the forward of one unit again, so that the activations inside of one unit, and
//! the weights of one part, are in memory at a time.

use std::collections::BTreeMap;

use sdxl_model::Unobserved;
use sdxl_model::unet::{Carry, InputBlock, Part, PartName, Scope, UnetChain};
use squeeze_base::error::{Error, Result};
use tch::{Kind, Tensor};

use super::parameters::Parameters;
use crate::calibration::Sample;

/// Sums of gradients, fp32 `[n]`, by the names of the parameters.
pub(super) type Gradients = BTreeMap<String, Tensor>;

/// The prediction of the network for some calls together, [calls x rows, c, h, w]: no gradients.
pub(super) fn predict(chain: &UnetChain, parameters: &Parameters<'_>, calls: &[&Sample]) -> Result<Tensor> {
    let source = parameters.source(false);
    let mut carry = begin(&chain.load_input_block(&source)?, calls)?;
    for name in chain.parts().filter(|name| *name != PartName::InputBlock) {
        let part = chain.load_part(name, &source)?;
        for unit in 0..part.blocks() {
            carry = run(&part, unit, carry)?.1;
        }
    }
    Ok(carry.hidden_states)
}

/// Adds the gradient of `loss` of the prediction, times `scale`, to `gradients`; returns the loss.
///
/// # Errors
/// If libtorch refuses, usually for want of memory.
pub(super) fn add_gradient(
    chain: &UnetChain,
    parameters: &Parameters<'_>,
    calls: &[&Sample],
    loss: &dyn Fn(&Tensor) -> Result<Tensor>,
    scale: f64,
    gradients: &mut Gradients,
) -> Result<f64> {
    let source = parameters.source(false);
    let mut inputs = Vec::new();
    let mut carry = begin(&chain.load_input_block(&source)?, calls)?;
    for name in chain.parts().filter(|name| matches!(name, PartName::Stage(_))) {
        let part = chain.load_part(name, &source)?;
        let mut of_part = Vec::with_capacity(part.blocks());
        for unit in 0..part.blocks() {
            let (before, after) = run(&part, unit, carry)?;
            of_part.push(before);
            carry = after;
        }
        inputs.push((name, of_part));
    }

    let learning = Learning::load(chain, PartName::OutputBlock, parameters)?;
    let last = carry.as_leaves()?;
    let prediction = learning.part.forward(Scope::Whole, last.shallow_clone(), &mut Unobserved)?.hidden_states;
    let value = loss(&prediction)?;
    let mut gradient = CarryGradient::default();
    learning.back(value.f_mul_scalar(scale)?, Some(&last), &mut gradient, parameters, gradients)?;
    drop((learning, carry, last, prediction));

    for (name, units) in inputs.into_iter().rev() {
        let learning = Learning::load(chain, name, parameters)?;
        for (unit, before) in units.into_iter().enumerate().rev() {
            let before = before.as_leaves()?;
            let after = learning.part.forward(Scope::Block(unit), before.shallow_clone(), &mut Unobserved)?;
            let along = gradient.along(&after)?;
            learning.back(along, Some(&before), &mut gradient, parameters, gradients)?;
        }
    }

    let learning = Learning::load(chain, PartName::InputBlock, parameters)?;
    let Part::InputBlock(input_block) = &learning.part else { return Err(Error::internal("the input block is no input block")) };
    let first = begin(input_block, calls)?;
    let along = gradient.along(&first)?;
    learning.back(along, None, &mut gradient, parameters, gradients)?;
    Ok(value.f_double_value(&[])?)
}

/// The carry after the input block. Each call has its own timestep.
fn begin(input_block: &InputBlock, calls: &[&Sample]) -> Result<Carry> {
    let first = |call: &&Sample| input_block.forward(&call.sample, call.timestep, &call.conditioning, &mut Unobserved);
    Carry::join(&calls.iter().map(first).collect::<Result<Vec<_>>>()?)
}

/// The carry that a unit was given, in the dtype in which the unit computes it without overflow,
/// and the carry after it.
fn run(part: &Part, unit: usize, before: Carry) -> Result<(Carry, Carry)> {
    let after = part.forward(Scope::Block(unit), before.shallow_clone(), &mut Unobserved)?;
    if before.kind()? != Kind::Half || after.is_finite()? {
        return Ok((before, after.fitted()?));
    }
    let wide = before.beyond_half()?;
    let after = part.forward(Scope::Block(unit), wide.shallow_clone(), &mut Unobserved)?;
    Ok((wide, after.fitted()?))
}

/// A part whose trained tensors are leaves.
struct Learning {
    part: Part,
    leaves: Vec<(String, Tensor)>,
}

impl Learning {
    fn load(chain: &UnetChain, name: PartName, parameters: &Parameters<'_>) -> Result<Self> {
        let source = parameters.source(true);
        let part = chain.load_part(name, &source)?;
        Ok(Learning { part, leaves: source.into_leaves() })
    }

    /// Backpropagates from `along`: adds to the parameters' `gradients`, and puts the gradient of
    /// `before` in the place of that of the carry after it. The gradient of the time embedding is a
    /// sum over all units.
    fn back(
        &self,
        along: Tensor,
        before: Option<&Carry>,
        gradient: &mut CarryGradient,
        parameters: &Parameters<'_>,
        gradients: &mut Gradients,
    ) -> Result<()> {
        let mut inputs: Vec<Tensor> = Vec::new();
        if let Some(before) = before {
            inputs.extend([before.hidden_states.shallow_clone(), before.temb.shallow_clone()]);
            inputs.extend(before.tokens.iter().chain(&before.down_block_res_samples).map(Tensor::shallow_clone));
        }
        let of_carry = inputs.len();
        inputs.extend(self.leaves.iter().map(|(_, leaf)| leaf.shallow_clone()));
        let mut found = Tensor::f_run_backward(&[along], &inputs, false, false)?;
        for ((name, _), found) in self.leaves.iter().zip(found.split_off(of_carry)) {
            // Other units of the part have no gradient here.
            if found.defined() {
                let found = parameters.gradient(name, &found)?;
                let sum = match gradients.remove(name) {
                    Some(sum) => sum.f_add(&found)?,
                    None => found,
                };
                gradients.insert(name.clone(), sum);
            }
        }
        let Some(before) = before else { return Ok(()) };
        let mut found = found.into_iter().map(|found| found.defined().then_some(found));
        gradient.hidden_states = found.next().flatten();
        gradient.temb = match (gradient.temb.take(), found.next().flatten()) {
            (Some(sum), Some(found)) => Some(sum.f_add(&found.f_to_kind(Kind::Float)?)?),
            (None, Some(found)) => Some(found.f_to_kind(Kind::Float)?),
            (sum, None) => sum,
        };
        gradient.tokens = if before.tokens.is_some() { found.next().flatten() } else { None };
        gradient.residuals = found.collect();
        Ok(())
    }
}

/// The gradient of each tensor of a carry; `None` is zero.
#[derive(Default)]
struct CarryGradient {
    hidden_states: Option<Tensor>,
    tokens: Option<Tensor>,
    residuals: Vec<Option<Tensor>>,
    /// fp32; that of the parts behind.
    temb: Option<Tensor>,
}

impl CarryGradient {
    /// The sum of the products of `after` and its gradient, whose gradient by anything before is
    /// what is propagated.
    fn along(&self, after: &Carry) -> Result<Tensor> {
        let temb_learns = after.temb.requires_grad() && !after.temb.is_leaf();
        let pairs = [(Some(&after.hidden_states), self.hidden_states.as_ref()), (after.tokens.as_ref(), self.tokens.as_ref())];
        let residuals = after.down_block_res_samples.iter().map(Some).zip(self.residuals.iter().map(Option::as_ref));
        let temb = temb_learns.then_some((Some(&after.temb), self.temb.as_ref()));
        let mut along: Option<Tensor> = None;
        for pair in pairs.into_iter().chain(residuals).chain(temb) {
            if let (Some(tensor), Some(gradient)) = pair {
                let product = tensor.f_to_kind(Kind::Float)?.f_mul(&gradient.f_to_kind(Kind::Float)?)?.f_sum(Kind::Float)?;
                along = Some(match along {
                    Some(sum) => sum.f_add(&product)?,
                    None => product,
                });
            }
        }
        along.ok_or_else(|| Error::internal("the network's output does not depend on its parts"))
    }
}
