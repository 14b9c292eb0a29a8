//! Gathers the Hessians of a stage's layers while calibration runs through it.

use std::collections::{BTreeMap, BTreeSet};

use tch::Tensor;

use crate::error::{Error, Result};
use crate::model::{Layer, LayerKind, Observer};
use crate::solver::Hessian;

/// An observer that adds each wanted layer's input to its Hessian.
///
/// Linear layers that are given the same tensor share one Hessian (`to_q`, `to_k`, `to_v` of a self-attention; the keys and values
/// of every cross-attention; every `time_emb_proj`). Which do is found out in the first forward.
#[derive(Debug, Default)]
pub struct Gatherer {
    wanted: BTreeSet<String>,
    hessians: Vec<(String, Hessian)>,
    /// Layer -> its Hessian; the layer whose name stands beside it adds to it.
    of: BTreeMap<String, usize>,
    /// Inputs of the first forward, kept so that no other tensor can take their place in memory.
    seen: Vec<(Tensor, usize)>,
}

/// Inputs that are held through the first forward are small; of large ones only the last.
const SMALL: usize = 1 << 19;

impl Gatherer {
    /// A gatherer for the layers of these names.
    pub fn new(wanted: impl IntoIterator<Item = String>) -> Self {
        Gatherer { wanted: wanted.into_iter().collect(), ..Gatherer::default() }
    }

    /// Tells that a forward has ended.
    pub fn forward_done(&mut self) {
        self.seen.clear();
    }

    /// The Hessian of a layer, if it has been run.
    pub fn hessian(&self, layer: &str) -> Option<&Hessian> {
        self.of.get(layer).map(|index| &self.hessians[*index].1)
    }

    /// How many Hessians there are, for how many layers.
    pub fn counts(&self) -> (usize, usize) {
        (self.hessians.len(), self.of.len())
    }

    /// Finds the Hessian that this very tensor goes into already.
    fn shared(&self, input: &Tensor) -> Option<usize> {
        let same = |other: &Tensor| {
            other.data_ptr() == input.data_ptr() && other.size() == input.size() && other.stride() == input.stride()
        };
        self.seen.iter().find_map(|(other, index)| same(other).then_some(*index))
    }

    fn place(&mut self, layer: &Layer, input: &Tensor) -> Result<usize> {
        let linear = layer.kind() == LayerKind::Linear;
        if let (true, Some(index)) = (linear, self.shared(input)) {
            return Ok(index);
        }
        self.hessians.push((layer.name().to_owned(), Hessian::for_layer(layer, layer.weight().device())?));
        let index = self.hessians.len() - 1;
        if linear {
            if let Some(last) = self.seen.last()
                && last.0.numel() > SMALL
            {
                self.seen.pop();
            }
            self.seen.push((input.shallow_clone(), index));
        }
        Ok(index)
    }
}

impl Observer for Gatherer {
    fn input(&mut self, layer: &Layer, input: &Tensor) -> Result<()> {
        if !self.wanted.contains(layer.name()) {
            return Ok(());
        }
        let index = match self.of.get(layer.name()) {
            Some(index) => *index,
            None => {
                let index = self.place(layer, input)?;
                self.of.insert(layer.name().to_owned(), index);
                index
            }
        };
        let (owner, hessian) = &mut self.hessians[index];
        if owner != layer.name() {
            return Ok(());
        }
        hessian.add(input).map_err(Error::layer(layer.name()))
    }
}
