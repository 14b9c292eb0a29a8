//! The sums over calibration samples that layers are compressed with.

use std::collections::BTreeMap;

use sdxl_model::{Layer, LayerInput};
use squeeze_base::error::{Error, Result};
use squeeze_solver::{Hessian, OutputResidual, WaitingHessian};
use tch::{Device, Tensor};

use super::watcher::Seen;
use crate::geometry::input_geometry;

/// Vectors that are kept of each held-out batch on a CPU.
pub(super) const HELD_OUT_VECTORS: i64 = 144;

/// The Hessians of the inputs of some layers. Layers that are given the same tensor share one.
///
/// Where layers have a dense target, it also has the correlations of their inputs with their output
/// residuals: the outputs of the dense network less those of the compressed one.
#[derive(Debug, Default)]
pub struct Gatherer {
    /// The Hessian of each input, with the name of the layer that is first given it.
    hessians: BTreeMap<LayerInput, (String, Hessian)>,
    /// Hessians that wait in the host's memory until they are taken.
    waiting: BTreeMap<LayerInput, WaitingHessian>,
    corrections: BTreeMap<String, OutputResidual>,
    held_out: BTreeMap<LayerInput, Tensor>,
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

    /// Adds the sums of another gatherer. Sums that only one of them has stay on their device.
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
            match self.corrections.get_mut(&layer) {
                Some(sum) => sum.merge(correction)?,
                None => {
                    self.corrections.insert(layer, correction);
                }
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
    #[must_use]
    pub fn hessian(&self, input: &LayerInput) -> Option<&Hessian> {
        self.hessians.get(input).map(|(_, hessian)| hessian)
    }

    /// Takes the Hessian of an input out; one that waits on the host comes back to its
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

    /// Adds what a layer was given, from any device.
    ///
    /// # Errors
    /// As [`Hessian::add`] and [`OutputResidual::add`].
    pub(super) fn add_seen(&mut self, seen: Seen) -> Result<()> {
        match seen {
            Seen::Summed { source, input } => self.add(&source, &input),
            Seen::HeldOut { source, input, vectors } => {
                let (layer, hessian) = self.hessians.get(&source).expect("what is watched has a Hessian");
                let new = hessian.some_vectors(&input, vectors).map_err(Error::layer(layer))?;
                let all = match self.held_out.get(&source) {
                    Some(old) => Tensor::f_cat(&[old, &new], 0)?,
                    None => new,
                };
                self.held_out.insert(source, all);
                Ok(())
            }
            Seen::Residual { layer, input, residual, source: _ } => {
                let correction = self.corrections.get_mut(&layer).expect("a layer with a target has a sum");
                correction.add(&input, &residual).map_err(Error::layer(&layer))
            }
        }
    }
}
