//! The outputs of the dense network that compressed layers are fitted to.

use std::collections::BTreeMap;

use sdxl_model::{Layer, Observer};
use squeeze_base::error::{Error, Result};
use squeeze_numerics::finite::are_finite;
use tch::Tensor;

/// An observer that keeps the outputs of some layers, each with the residual that the network adds
/// to it.
#[derive(Debug, Default)]
pub(super) struct DenseOutputs {
    layers: Vec<String>,
    ends_early: bool,
    residuals: BTreeMap<String, Tensor>,
    outputs: BTreeMap<String, Tensor>,
}

impl DenseOutputs {
    /// An observer of `layers`, by name.
    pub(super) fn of(layers: Vec<String>) -> Self {
        DenseOutputs { layers, ..DenseOutputs::default() }
    }

    /// Ends the forward with [`Error::SeenEnough`] once all outputs are there.
    pub(super) fn ending_early(self) -> Self {
        DenseOutputs { ends_early: true, ..self }
    }

    /// Takes the output of a layer, if it is there.
    pub(super) fn take(&mut self, layer: &str) -> Option<Tensor> {
        self.outputs.remove(layer)
    }

    /// Whether every output has been taken.
    pub(super) fn is_empty(&self) -> bool {
        self.outputs.is_empty()
    }

    /// Puts back an output that was taken.
    pub(super) fn put_back(&mut self, layer: &str, output: Tensor) {
        self.outputs.insert(layer.to_owned(), output);
    }

    /// Whether all outputs are finite. The device is waited for.
    pub(super) fn are_finite(&self) -> Result<bool> {
        are_finite(self.outputs.values())
    }

    fn has(&self, layer: &Layer) -> bool {
        self.layers.iter().any(|name| name == layer.name())
    }
}

impl Observer for DenseOutputs {
    fn input(&mut self, _layer: &Layer, _input: &Tensor) -> Result<()> {
        Ok(())
    }

    fn residual(&mut self, layer: &Layer, residual: &Tensor) -> Result<()> {
        if self.has(layer) {
            self.residuals.insert(layer.name().to_owned(), residual.shallow_clone());
        }
        Ok(())
    }

    fn output(&mut self, layer: &Layer, output: &Tensor) -> Result<()> {
        if self.has(layer) {
            let sum = with_residual(output, self.residuals.remove(layer.name()).as_ref())?;
            self.outputs.insert(layer.name().to_owned(), sum);
        }
        if self.ends_early && self.outputs.len() == self.layers.len() { Err(Error::SeenEnough) } else { Ok(()) }
    }
}

/// The sum of an output and its residual, in new memory.
pub(super) fn with_residual(output: &Tensor, residual: Option<&Tensor>) -> Result<Tensor> {
    let Some(residual) = residual else { return Ok(output.f_mul_scalar(1.0)?) };
    if output.dim() == 3 && residual.dim() == 4 {
        // The residual is an image, and the output the tokens of one.
        let tokens = residual.f_permute([0, 2, 3, 1])?.f_reshape(output.size())?;
        return Ok(output.f_add(&tokens)?);
    }
    Ok(output.f_add(residual)?)
}
