//! Activations beyond fp16, which ends at 65504.
//!
//! A unit of the network computes in the dtype of the features that it is given, so a unit whose
//! activations overflow fp16 is run again on wider features. Its output goes back to fp16 where it
//! fits there.

use std::collections::BTreeMap;

use squeeze_base::error::Result;
use squeeze_numerics::device::beyond_half;
use squeeze_numerics::finite::is_finite;
use tch::{Kind, Tensor};

use super::carry::Carry;
use super::stage::{Stage, StageName};
use crate::layer::Unobserved;

impl Carry {
    /// The dtype of the features: that in which the next unit computes.
    ///
    /// # Errors
    /// If libtorch has another dtype than tch knows.
    pub fn kind(&self) -> Result<Kind> {
        Ok(self.tokens.as_ref().unwrap_or(&self.hidden_states).f_kind()?)
    }

    /// Whether the features are finite. The device is waited for.
    ///
    /// # Errors
    /// If libtorch refuses an operation.
    pub fn is_finite(&self) -> Result<bool> {
        is_finite(self.tokens.as_ref().unwrap_or(&self.hidden_states))
    }

    /// The carry with features in `kind`.
    ///
    /// # Errors
    /// If libtorch refuses, usually for want of memory.
    pub fn to_kind(&self, kind: Kind) -> Result<Carry> {
        let tokens = self.tokens.as_ref().map(|tokens| tokens.f_to_kind(kind)).transpose()?;
        // Inside a transformer the hidden states are its input, converted where it ends.
        let hidden_states =
            if tokens.is_some() { self.hidden_states.shallow_clone() } else { self.hidden_states.f_to_kind(kind)? };
        Ok(Carry { hidden_states, tokens, ..self.shallow_clone() })
    }

    /// The carry with its features in a dtype that has no overflow where fp16 has one.
    ///
    /// # Errors
    /// If libtorch refuses, usually for want of memory.
    pub fn beyond_half(&self) -> Result<Carry> {
        self.to_kind(beyond_half(self.hidden_states.device()))
    }

    /// The carry with each tensor of features in fp16 that has a wider dtype and fits, if fp16 is
    /// the dtype of the run, which is that of the text states. The device is waited for where a
    /// tensor is wider.
    ///
    /// # Errors
    /// If libtorch refuses an operation.
    pub fn fitted(self) -> Result<Carry> {
        if self.encoder_hidden_states.f_kind()? != Kind::Half {
            return Ok(self);
        }
        let residuals = self.down_block_res_samples.iter();
        Ok(Carry {
            hidden_states: fitted(&self.hidden_states)?,
            tokens: self.tokens.as_ref().map(fitted).transpose()?,
            down_block_res_samples: residuals.map(fitted).collect::<Result<_>>()?,
            ..self
        })
    }
}

impl Stage {
    /// As [`forward`](Self::forward), unobserved; a run in fp16 whose output is not finite is
    /// repeated in a wider dtype. In fp16 the device is waited for.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn forward_in_range(&self, carry: Carry) -> Result<Carry> {
        let run = |carry: Carry| self.forward(carry, &mut Unobserved);
        if carry.encoder_hidden_states.f_kind()? != Kind::Half {
            return run(carry);
        }
        WideStages::default().run_checked(self.name(), carry, &run)
    }
}

/// A tensor in fp16, or as it is if it does not fit.
fn fitted(tensor: &Tensor) -> Result<Tensor> {
    if tensor.f_kind()? == Kind::Half {
        return Ok(tensor.shallow_clone());
    }
    let half = tensor.f_to_kind(Kind::Half)?;
    Ok(if is_finite(&half)? { half } else { tensor.shallow_clone() })
}

/// The stages of a UNet that compute in a wider dtype than fp16.
#[derive(Debug, Clone, Default)]
pub(super) struct WideStages(BTreeMap<StageName, WideStage>);

/// A stage that computes in a wider dtype than fp16.
#[derive(Debug, Clone, Copy)]
struct WideStage {
    kind: Kind,
    /// Whether its output goes back to fp16.
    output_fits: bool,
}

impl WideStages {
    /// Runs the stage `name` in its dtype, without a check.
    pub(super) fn run(&self, name: StageName, carry: Carry, run: &dyn Fn(Carry) -> Result<Carry>) -> Result<Carry> {
        let Some(stage) = self.0.get(&name) else { return run(carry) };
        let known = carry.down_block_res_samples.len();
        let mut after = run(carry.to_kind(stage.kind)?)?;
        if stage.output_fits {
            after = after.to_kind(Kind::Half)?;
            for residual in after.down_block_res_samples.iter_mut().skip(known) {
                *residual = residual.f_to_kind(Kind::Half)?;
            }
        }
        Ok(after)
    }

    /// Runs the stage `name`, in a wider dtype if its output is not finite, which is kept for later
    /// runs.
    pub(super) fn run_checked(&mut self, name: StageName, carry: Carry, run: &dyn Fn(Carry) -> Result<Carry>) -> Result<Carry> {
        if !self.0.contains_key(&name) && carry.kind()? == Kind::Half {
            let after = run(carry.shallow_clone())?;
            if after.is_finite()? {
                return Ok(after);
            }
        }
        let wide = carry.beyond_half()?;
        let kind = wide.kind()?;
        let known = carry.down_block_res_samples.len();
        let after = run(wide)?.fitted()?;
        let is_half = |tensor: &Tensor| Ok::<bool, tch::TchError>(tensor.f_kind()? == Kind::Half);
        let mut output_fits = is_half(&after.hidden_states)?;
        for residual in after.down_block_res_samples.iter().skip(known) {
            output_fits &= is_half(residual)?;
        }
        self.0.insert(name, WideStage { kind, output_fits });
        Ok(after)
    }

    /// Sentences for people, one for each stage.
    pub(super) fn notes(&self) -> Vec<String> {
        self.0.iter().map(|(name, stage)| beyond_half_note(&name.to_string(), stage.kind)).collect()
    }
}

/// What a log and a report say of a unit that computes in `kind` instead of fp16.
#[must_use]
pub fn beyond_half_note(unit: &str, kind: Kind) -> String {
    let dtype = if kind == Kind::BFloat16 { "bf16" } else { "fp32" };
    format!("the activations of `{unit}` are beyond fp16, which ends at 65504; it computes in {dtype}")
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;

    fn carry() -> Carry {
        let tensor = |value: f64, size: &[i64]| Tensor::full(size, value, (Kind::Half, Device::Cpu));
        Carry {
            hidden_states: tensor(100.0, &[1, 2, 2, 2]),
            tokens: None,
            down_block_res_samples: vec![tensor(1.0, &[1, 2, 2, 2])],
            temb: tensor(0.5, &[1, 4]),
            encoder_hidden_states: tensor(0.25, &[1, 7, 4]),
        }
    }

    /// A stage that multiplies its input and leaves it as a residual too.
    fn times(factor: f64) -> impl Fn(Carry) -> Result<Carry> {
        move |mut carry| {
            carry.hidden_states = carry.hidden_states.f_mul_scalar(factor)?;
            carry.push_residual();
            Ok(carry)
        }
    }

    #[test]
    fn what_does_not_fit_stays_wide_until_it_does() {
        let factors = [2.0, 1000.0, 0.001, 2.0];
        let run = |wide: &mut WideStages, checked: bool| {
            let mut carry = carry();
            let mut kinds = Vec::new();
            for (index, factor) in factors.into_iter().enumerate() {
                let (name, run) = (StageName::Down(index), times(factor));
                carry = if checked { wide.run_checked(name, carry, &run) } else { wide.run(name, carry, &run) }.unwrap();
                kinds.push(carry.kind().unwrap());
            }
            (carry, kinds)
        };
        let mut wide = WideStages::default();
        let (plain, _) = run(&mut wide, false);
        assert!(!plain.is_finite().unwrap() && wide.notes().is_empty());
        let (checked, kinds) = run(&mut wide, true);
        assert_eq!(kinds, [Kind::Half, Kind::BFloat16, Kind::Half, Kind::Half]);
        assert!(checked.is_finite().unwrap());
        assert!((checked.hidden_states.mean(Kind::Float).double_value(&[]) / 400.0 - 1.0).abs() < 0.01);
        let residuals: Vec<Kind> = checked.down_block_res_samples.iter().map(Tensor::kind).collect();
        assert_eq!(residuals, [Kind::Half, Kind::Half, Kind::BFloat16, Kind::Half, Kind::Half]);
        assert_eq!((checked.temb.kind(), checked.encoder_hidden_states.kind()), (Kind::Half, Kind::Half));
        // The stages are known now, and nothing has to be checked.
        assert_eq!(wide.notes().len(), 2);
        let (known, again) = run(&mut wide, false);
        assert_eq!((&known.hidden_states, again), (&checked.hidden_states, kinds));
        // A residual of another dtype joins the hidden states in theirs.
        let mut carry = checked;
        while !carry.down_block_res_samples.is_empty() {
            carry.pop_residual().unwrap();
            assert_eq!(carry.kind().unwrap(), Kind::Half);
        }
    }

    #[test]
    fn fp32_is_left_alone() {
        let wide = carry();
        let text = wide.encoder_hidden_states.to_kind(Kind::Float);
        let carry = Carry { hidden_states: wide.hidden_states.to_kind(Kind::Float), encoder_hidden_states: text, ..wide };
        assert_eq!(carry.fitted().unwrap().kind().unwrap(), Kind::Float);
    }
}
