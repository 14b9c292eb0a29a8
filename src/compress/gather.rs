//! Gathers Hessians while calibration runs through a stage.

use std::collections::BTreeMap;

use tch::{Device, Tensor};

use crate::error::{Error, Result};
use crate::model::{Layer, LayerInput, Observer};
use crate::solver::Hessian;

/// An observer that sums the inputs of some layers, each input once: layers that are given the same tensor share a Hessian.
#[derive(Debug, Default)]
pub struct Gatherer {
    /// Each input with the layer that is asked for it, the first that has it.
    hessians: BTreeMap<LayerInput, (String, Hessian)>,
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
                let hessian = Hessian::for_layer(layer, device).map_err(Error::layer(layer.name()))?;
                hessians.insert(layer.input().clone(), (layer.name().to_owned(), hessian));
            }
        }
        Ok(Gatherer { hessians })
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
            Some((first, hessian)) if first == layer.name() => hessian.add(input).map_err(Error::layer(layer.name())),
            _ => Ok(()),
        }
    }
}
