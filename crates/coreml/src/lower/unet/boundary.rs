//! The tensors that one of two chunks passes to the other, in fp32 (apple/ml-stable-diffusion,
//! `chunk_mlprogram.py`).

use squeeze_base::error::{Error, Result};

use super::super::Network;
use super::UnetLowering;
use super::ends::text_states;
use crate::element::ArrayType;
use crate::options::Io;
use crate::portion::{HIDDEN_STATES, SILU_TEMB, skip_name};
use crate::program::Var;

impl<'a> UnetLowering<'a> {
    /// Goes on after another chunk, whose outputs `passed` are inputs of this program, as the text
    /// states are. Returns the image features, and the inputs that were passed.
    pub(super) fn resume(
        mut network: Network<'a>,
        passed: Vec<(String, ArrayType)>,
        (io, text): (Io, Option<&Var>),
    ) -> Result<(Self, Var, Vec<Var>)> {
        let text = text.map(|text| text_states(&mut network, io, text)).transpose()?;
        let (mut hidden, mut silu_temb, mut residuals, mut inputs) = (None, None, Vec::new(), Vec::new());
        for (name, array) in passed {
            inputs.push(network.input(&name, array));
        }
        for input in &inputs {
            let half = network.cast(&format!("{}.fp16", input.name), input, "fp16")?;
            match input.name.as_str() {
                HIDDEN_STATES => hidden = Some(half),
                SILU_TEMB => silu_temb = Some(half),
                _ => residuals.push(half),
            }
        }
        let none = || Error::internal("a chunk is passed no image features");
        let hidden = hidden.or_else(|| residuals.last().cloned()).ok_or_else(none)?;
        Ok((UnetLowering { network, silu_temb, text, residuals }, hidden, inputs))
    }

    /// Makes the outputs `passed` for the next chunk.
    pub(super) fn pass_on(&mut self, hidden: &Var, passed: &[(String, ArrayType)]) -> Result<Vec<Var>> {
        let mut outputs = Vec::new();
        for (name, array) in passed {
            let index = || (0..self.residuals.len()).find(|index| skip_name(*index) == *name);
            let value = match name.as_str() {
                HIDDEN_STATES => Some(hidden),
                SILU_TEMB => self.silu_temb.as_ref(),
                _ => index().map(|index| &self.residuals[index]),
            };
            let value = value.ok_or_else(|| Error::internal(format!("there is no `{name}` to pass on")))?.clone();
            let output = self.network.cast(name, &value, "fp32")?;
            if output.name != *name || output.operand.array != *array {
                let (made, array) = (output.name, output.operand.array);
                return Err(Error::internal(format!("`{made}`, {array}, was made in the place of `{name}`")));
            }
            outputs.push(output);
        }
        Ok(outputs)
    }
}
