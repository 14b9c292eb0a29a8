//! Gathers Hessians while calibration runs through a stage.

use std::collections::BTreeMap;

use tch::{Device, Tensor};

use crate::error::{Error, Result};
use crate::geometry::input_geometry;
use crate::model::{Layer, LayerInput, Observer};
use crate::solver::{Hessian, OutputResidual};

/// An observer that sums the inputs of some layers, each input once: layers that are given the same tensor share a Hessian.
///
/// Where layers aim at the dense network's outputs, it also sums what theirs lack of them.
#[derive(Debug, Default)]
pub struct Gatherer {
    /// Each input with the layer that is asked for it, the first that has it.
    hessians: BTreeMap<LayerInput, (String, Hessian)>,
    /// How much the sample at hand counts; `None`: 1.
    weight: Option<f64>,
    corrections: BTreeMap<String, OutputResidual>,
    /// Whether the sample at hand is held out: some of its vectors are kept, and none is summed.
    holding: bool,
    held: BTreeMap<LayerInput, Tensor>,
    /// What the layers' outputs are to be for the sample at hand, with what is added to them.
    targets: DenseOutputs,
    /// What the layers at hand have been given, and what is added to what they make of it.
    given: BTreeMap<String, (Option<Tensor>, Option<Tensor>)>,
    /// Whether a forward ends as soon as nothing is left to be seen.
    hasty: bool,
}

impl Gatherer {
    /// A gatherer on `device` for the inputs of `layers`, in execution order.
    ///
    /// # Errors
    /// If there is no memory for the Hessians.
    pub fn new<'a>(layers: impl IntoIterator<Item = &'a Layer>, device: Device) -> Result<Self> {
        let mut hessians = BTreeMap::new();
        for layer in layers {
            if !hessians.contains_key(layer.input()) {
                let hessian = Hessian::for_weight(input_geometry(layer), &layer.weight().size(), device)
                    .map_err(Error::layer(layer.name()))?;
                hessians.insert(layer.input().clone(), (layer.name().to_owned(), hessian));
            }
        }
        Ok(Gatherer { hessians, ..Gatherer::default() })
    }

    /// The same, for layers that aim at the dense network's outputs.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub(super) fn aiming<'a>(layers: impl Iterator<Item = &'a Layer> + Clone, device: Device) -> Result<Self> {
        let mut gatherer = Gatherer::new(layers.clone(), device)?;
        for layer in layers {
            let correction = OutputResidual::for_weight(input_geometry(layer), &layer.weight().size(), device)
                .map_err(Error::layer(layer.name()))?;
            gatherer.corrections.insert(layer.name().to_owned(), correction);
        }
        Ok(gatherer)
    }

    /// Ends forwards with [`Error::SeenEnough`] as soon as its one input, or what its layers make of it, has been seen.
    pub(super) fn hasty(self) -> Self {
        Gatherer { hasty: true, ..self }
    }

    /// Says how much the next sample counts.
    pub(super) fn weigh(&mut self, weight: f64) {
        self.weight = (weight != 1.0).then_some(weight);
    }

    /// Says whether the next sample is held out.
    pub(super) fn hold_out(&mut self, holding: bool) {
        self.holding = holding;
    }

    /// Vectors of an input that were held out, [n, d], if any.
    pub(super) fn held_out(&self, input: &LayerInput) -> Option<&Tensor> {
        self.held.get(input)
    }

    /// Says what the outputs for the next sample are to be.
    pub(super) fn aim_at(&mut self, targets: DenseOutputs) {
        self.targets = targets;
    }

    /// By how much each layer's outputs were off, where that was asked for.
    pub(super) fn corrections(&self) -> &BTreeMap<String, OutputResidual> {
        &self.corrections
    }

    /// Adds an input that is known without running a stage: text states or SiLU(temb).
    ///
    /// # Errors
    /// As [`Hessian::add`].
    pub fn add(&mut self, input: &LayerInput, tensor: &Tensor) -> Result<()> {
        match self.hessians.get_mut(input) {
            Some((layer, hessian)) => hessian.add(tensor).map_err(Error::layer(layer)),
            None => Ok(()),
        }
    }

    /// Adds what another gatherer of the same layers has seen.
    ///
    /// # Errors
    /// If the other is of other layers.
    pub fn merge(&mut self, other: Gatherer) -> Result<()> {
        for (input, vectors) in other.held {
            let all = match self.held.get(&input) {
                Some(own) => Tensor::f_cat(&[own, &vectors.f_to_device(own.device())?], 0)?,
                None => vectors,
            };
            self.held.insert(input, all);
        }
        for (layer, correction) in other.corrections {
            if let Some(sum) = self.corrections.get_mut(&layer) {
                sum.merge(correction)?;
            }
        }
        for (input, (layer, hessian)) in other.hessians {
            match self.hessians.get_mut(&input) {
                Some((_, sum)) => sum.merge(hessian).map_err(Error::layer(&layer))?,
                None => {
                    self.hessians.insert(input, (layer, hessian));
                }
            }
        }
        Ok(())
    }

    /// The Hessian of an input, if it was asked for.
    pub fn hessian(&self, input: &LayerInput) -> Option<&Hessian> {
        self.hessians.get(input).map(|(_, hessian)| hessian)
    }

    /// Takes the Hessian of an input out.
    pub fn take(&mut self, input: &LayerInput) -> Option<Hessian> {
        self.hessians.remove(input).map(|(_, hessian)| hessian)
    }
}

impl Observer for Gatherer {
    fn input(&mut self, layer: &Layer, input: &Tensor) -> Result<()> {
        match self.hessians.get_mut(layer.input()) {
            Some((first, hessian)) if first == layer.name() && self.holding => {
                let new = hessian.some_vectors(input, HELD_VECTORS).map_err(Error::layer(layer.name()))?;
                let all = match self.held.get(layer.input()) {
                    Some(old) => Tensor::f_cat(&[old, &new], 0)?,
                    None => new,
                };
                self.held.insert(layer.input().clone(), all);
            }
            Some((first, hessian)) if first == layer.name() => {
                let weighed = self.weight.map(|weight| input.f_mul_scalar(weight.sqrt())).transpose()?;
                hessian.add(weighed.as_ref().unwrap_or(input)).map_err(Error::layer(layer.name()))?;
            }
            _ => {}
        }
        if self.corrections.contains_key(layer.name()) && !self.holding {
            self.given.entry(layer.name().to_owned()).or_default().0 = Some(input.shallow_clone());
        }
        let only_inputs = self.corrections.is_empty() || self.holding;
        if self.hasty && only_inputs && self.hessians.contains_key(layer.input()) { Err(Error::SeenEnough) } else { Ok(()) }
    }

    fn residual(&mut self, layer: &Layer, residual: &Tensor) -> Result<()> {
        if self.corrections.contains_key(layer.name()) {
            self.given.entry(layer.name().to_owned()).or_default().1 = Some(residual.shallow_clone());
        }
        Ok(())
    }

    fn output(&mut self, layer: &Layer, output: &Tensor) -> Result<()> {
        let Some(correction) = self.corrections.get_mut(layer.name()) else { return Ok(()) };
        let given = self.given.remove(layer.name());
        let (Some((Some(input), residual)), Some(mut target)) = (given, self.targets.outputs.remove(layer.name())) else {
            return Ok(());
        };
        let mut lack = target.f_sub_(&sum(output, residual.as_ref())?)?;
        if let Some(weight) = self.weight {
            lack = lack.f_mul_scalar_(weight)?;
        }
        correction.add(&input, &lack).map_err(Error::layer(layer.name()))?;
        if self.hasty && self.targets.outputs.is_empty() { Err(Error::SeenEnough) } else { Ok(()) }
    }
}

/// Vectors that are kept of a held-out sample.
pub(super) const HELD_VECTORS: i64 = 144;

/// Keeps the outputs of some layers, with what is added to them.
#[derive(Debug, Default)]
pub(super) struct DenseOutputs {
    wanted: Vec<String>,
    hasty: bool,
    residuals: BTreeMap<String, Tensor>,
    outputs: BTreeMap<String, Tensor>,
}

impl DenseOutputs {
    /// Those of these layers. One that is `hasty` ends the forward with [`Error::SeenEnough`] when it has all.
    pub fn of(wanted: Vec<String>, hasty: bool) -> Self {
        DenseOutputs { wanted, hasty, ..DenseOutputs::default() }
    }

    fn wants(&self, layer: &Layer) -> bool {
        self.wanted.iter().any(|name| name == layer.name())
    }
}

impl Observer for DenseOutputs {
    fn input(&mut self, _layer: &Layer, _input: &Tensor) -> Result<()> {
        Ok(())
    }

    fn residual(&mut self, layer: &Layer, residual: &Tensor) -> Result<()> {
        if self.wants(layer) {
            self.residuals.insert(layer.name().to_owned(), residual.shallow_clone());
        }
        Ok(())
    }

    fn output(&mut self, layer: &Layer, output: &Tensor) -> Result<()> {
        if self.wants(layer) {
            let whole = sum(output, self.residuals.remove(layer.name()).as_ref())?;
            self.outputs.insert(layer.name().to_owned(), whole);
        }
        if self.hasty && self.outputs.len() == self.wanted.len() { Err(Error::SeenEnough) } else { Ok(()) }
    }
}

/// An output and what is added to it, in new memory.
fn sum(output: &Tensor, residual: Option<&Tensor>) -> Result<Tensor> {
    let Some(residual) = residual else { return Ok(output.f_mul_scalar(1.0)?) };
    if output.dim() == 3 && residual.dim() == 4 {
        // An image, where the output is tokens of one.
        let tokens = residual.f_permute([0, 2, 3, 1])?.f_reshape(output.size())?;
        return Ok(output.f_add(&tokens)?);
    }
    Ok(output.f_add(residual)?)
}
