//! Gathers Hessians while calibration samples run.

use std::collections::{BTreeMap, BTreeSet};

use sdxl_model::{Layer, LayerInput, Observer};
use squeeze_base::error::{Error, Result};
use squeeze_numerics::finite::is_finite;
use squeeze_solver::{Hessian, OutputResidual, WaitingHessian};
use tch::{Device, Kind, Tensor};

use super::dense_outputs::{DenseOutputs, with_residual};
use crate::geometry::input_geometry;

/// Vectors that are kept of each held-out batch on a CPU.
pub(super) const HELD_OUT_VECTORS: i64 = 144;

/// An observer that sums the Hessians of the inputs of some layers. Layers that are given the same
/// tensor share a Hessian.
///
/// Where layers have a dense target, it also correlates their inputs with their output residuals:
/// the outputs of the dense network less those of the compressed one.
#[derive(Debug, Default)]
pub struct Gatherer {
    /// The Hessian of each input, with the name of the layer that is first given it.
    hessians: BTreeMap<LayerInput, (String, Hessian)>,
    /// Hessians that wait in the host's memory until they are taken.
    waiting: BTreeMap<LayerInput, WaitingHessian>,
    /// The weight of the sample under way; `None` is 1.
    weight: Option<f64>,
    corrections: BTreeMap<String, OutputResidual>,
    /// How many vectors of the samples under way are kept, if they are held out: none is summed.
    held_out_vectors: Option<i64>,
    held_out: BTreeMap<LayerInput, Tensor>,
    /// The dense outputs for the sample under way.
    targets: DenseOutputs,
    /// The layers under way that have a dense target.
    under_way: BTreeMap<String, UnderWay>,
    /// What the checked call under way has added so far; `None` if the call is not checked.
    checked: Option<Seen>,
    /// Whether a forward ends as soon as nothing is left to be seen.
    ends_early: bool,
}

/// The parts of a call that the sums have.
#[derive(Debug, Default)]
struct Seen {
    inputs: BTreeSet<LayerInput>,
    outputs: BTreeSet<String>,
}

/// A layer that is about to compute its output.
#[derive(Debug, Default)]
struct UnderWay {
    input: Option<Tensor>,
    /// The tensor that the network adds to the output.
    residual: Option<Tensor>,
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

    /// A gatherer for layers that are fitted to the outputs of the dense network.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub(super) fn with_targets<'a>(layers: impl Iterator<Item = &'a Layer> + Clone, device: Device) -> Result<Self> {
        let mut gatherer = Gatherer::new(layers.clone(), device)?;
        for layer in layers {
            let correction = OutputResidual::for_weight(input_geometry(layer), &layer.weight().size(), device)
                .map_err(Error::layer(layer.name()))?;
            gatherer.corrections.insert(layer.name().to_owned(), correction);
        }
        Ok(gatherer)
    }

    /// Ends forwards with [`Error::SeenEnough`] once the single input, or the outputs of its layers
    /// where they have a dense target, have been seen.
    pub(super) fn ending_early(self) -> Self {
        Gatherer { ends_early: true, ..self }
    }

    /// Begins a call of which nothing is added that is not finite, on any device: such a forward
    /// ends with [`Error::NotFinite`]. A forward of the same call can then take its place, which
    /// adds what the first one did not.
    pub(super) fn begin_checked(&mut self) {
        self.checked = Some(Seen::default());
    }

    /// Ends the checked call.
    pub(super) fn end_checked(&mut self) {
        self.checked = None;
    }

    /// Sets the weight of the next sample.
    pub(super) fn set_weight(&mut self, weight: f64) {
        self.weight = (weight != 1.0).then_some(weight);
    }

    /// Sets whether the next samples are held out, and how many of their vectors are kept then.
    pub(super) fn hold_out(&mut self, is_held_out: bool, vectors: i64) {
        self.held_out_vectors = is_held_out.then_some(vectors);
    }

    /// Sets the dense outputs for the next sample.
    pub(super) fn set_targets(&mut self, targets: DenseOutputs) {
        self.targets = targets;
        self.under_way.clear();
    }

    /// Takes out the vectors of an input that were held out, [n, d], if any.
    pub(super) fn take_held_out(&mut self, input: &LayerInput) -> Option<Tensor> {
        self.held_out.remove(input)
    }

    /// Takes out the correlation of a layer's input with its output residual, where the layer has a
    /// dense target.
    pub(super) fn take_correction(&mut self, layer: &str) -> Option<OutputResidual> {
        self.corrections.remove(layer)
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

    /// Adds the sums of another gatherer. Where layers have dense targets it has to be one of the
    /// same layers.
    ///
    /// # Errors
    /// If Hessians of one input differ in shape.
    pub fn merge(&mut self, other: Gatherer) -> Result<()> {
        for (input, vectors) in other.held_out {
            let all = match self.held_out.get(&input) {
                Some(own) => Tensor::f_cat(&[own, &vectors.f_to_device(own.device())?], 0)?,
                None => vectors,
            };
            self.held_out.insert(input, all);
        }
        for (layer, correction) in other.corrections {
            let sum = self.corrections.get_mut(&layer).expect("all devices gather for the same layers");
            sum.merge(correction)?;
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
    #[must_use]
    pub fn hessian(&self, input: &LayerInput) -> Option<&Hessian> {
        self.hessians.get(input).map(|(_, hessian)| hessian)
    }

    /// Takes the Hessian of an input out; one that [waits](Self::wait_on_host) comes back to its
    /// device.
    ///
    /// # Errors
    /// If the device's memory is too small for it.
    pub fn take(&mut self, input: &LayerInput) -> Result<Option<Hessian>> {
        match self.waiting.remove(input) {
            Some(waiting) => waiting.back().map(Some),
            None => Ok(self.hessians.remove(input).map(|(_, hessian)| hessian)),
        }
    }

    /// Whether Hessians wait in the host's memory.
    pub(super) fn has_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Lets all Hessians wait in the host's memory, which frees their memory on the device. Nothing
    /// can be added to them then, and [`hessian`](Self::hessian) does not find them.
    ///
    /// # Errors
    /// If the host's memory is too small.
    pub(super) fn wait_on_host(&mut self) -> Result<()> {
        while let Some((input, (layer, hessian))) = self.hessians.pop_first() {
            let waiting = WaitingHessian::of(hessian).map_err(Error::layer(&layer))?;
            self.waiting.insert(input, waiting);
        }
        Ok(())
    }

    fn has_target(&self, layer: &Layer) -> bool {
        let is_known = self.checked.as_ref().is_some_and(|seen| seen.outputs.contains(layer.name()));
        self.held_out_vectors.is_none() && !is_known && self.corrections.contains_key(layer.name())
    }

    fn end_if(&self, nothing_is_left: bool) -> Result<()> {
        if self.ends_early && nothing_is_left { Err(Error::SeenEnough) } else { Ok(()) }
    }
}

impl Observer for Gatherer {
    fn input(&mut self, layer: &Layer, input: &Tensor) -> Result<()> {
        let Some((first, hessian)) = self.hessians.get_mut(layer.input()) else { return Ok(()) };
        let is_known = self.checked.as_ref().is_some_and(|seen| seen.inputs.contains(layer.input()));
        let is_added = first == layer.name() && !is_known;
        let is_checked = self.checked.is_some();
        if let (true, Some(vectors)) = (is_added, self.held_out_vectors) {
            if is_checked {
                check_finite(layer, "input", input)?;
            }
            let new = hessian.some_vectors(input, vectors).map_err(Error::layer(layer.name()))?;
            let all = match self.held_out.get(layer.input()) {
                Some(old) => Tensor::f_cat(&[old, &new], 0)?,
                None => new,
            };
            self.held_out.insert(layer.input().clone(), all);
        } else if is_added {
            let weighted = self.weight.map(|weight| input.f_mul_scalar(weight.sqrt())).transpose()?;
            let vectors = weighted.as_ref().unwrap_or(input);
            if is_checked {
                check_finite(layer, "input", vectors)?;
            }
            hessian.add(vectors).map_err(Error::layer(layer.name()))?;
        }
        if let (true, Some(seen)) = (is_added, &mut self.checked) {
            seen.inputs.insert(layer.input().clone());
        }
        if self.has_target(layer) {
            self.under_way.entry(layer.name().to_owned()).or_default().input = Some(input.shallow_clone());
        }
        self.end_if(self.held_out_vectors.is_some() || self.corrections.is_empty())
    }

    fn residual(&mut self, layer: &Layer, residual: &Tensor) -> Result<()> {
        if self.has_target(layer) {
            self.under_way.entry(layer.name().to_owned()).or_default().residual = Some(residual.shallow_clone());
        }
        Ok(())
    }

    fn output(&mut self, layer: &Layer, output: &Tensor) -> Result<()> {
        if !self.has_target(layer) {
            return Ok(());
        }
        let UnderWay { input, residual } = self.under_way.remove(layer.name()).expect("a layer's input precedes its output");
        let input = input.expect("a layer's input precedes its output");
        let mut target = self.targets.take(layer.name()).expect("the dense network has run the same layers before");
        let ours = with_residual(output, residual.as_ref())?;
        let mut output_residual = match &mut self.checked {
            None => target.f_sub_(&ours)?,
            Some(seen) => {
                let wide = || target.f_to_kind(Kind::Float)?.f_sub(&ours.f_to_kind(Kind::Float)?);
                let mut difference = if target.f_kind()? == ours.f_kind()? { target.f_sub(&ours)? } else { wide()? };
                // Two numbers of fp16 may have a difference that is beyond it.
                if !is_finite(&difference)? {
                    difference = wide()?;
                }
                if let Err(why) = check_finite(layer, "output", &difference) {
                    self.targets.put_back(layer.name(), target);
                    return Err(why);
                }
                seen.outputs.insert(layer.name().to_owned());
                difference
            }
        };
        if let Some(weight) = self.weight {
            output_residual = output_residual.f_mul_scalar_(weight)?;
        }
        let correction = self.corrections.get_mut(layer.name()).expect("a layer with a target has a sum");
        correction.add(&input, &output_residual).map_err(Error::layer(layer.name()))?;
        self.end_if(self.targets.is_empty())
    }
}

/// Checks that a layer's input or output is finite. The device is waited for.
fn check_finite(layer: &Layer, what: &str, tensor: &Tensor) -> Result<()> {
    if is_finite(tensor)? {
        return Ok(());
    }
    let problem = format!("the layer's {what} has NaN or infinite values in it");
    Err(Error::layer(layer.name())(Error::NotFinite(problem)))
}
