//! Watching layers while one batch of samples runs.

use std::collections::{BTreeMap, BTreeSet};

use sdxl_model::{Layer, LayerInput, Observer};
use squeeze_base::error::{Error, Result};
use tch::Tensor;

use super::dense_outputs::{DenseOutputs, with_residual};

/// What a layer was given in a batch, with its place in the sums.
#[derive(Debug)]
pub(super) enum Seen {
    /// An input that is summed.
    Summed { source: LayerInput, input: Tensor, weight: f64 },
    /// An input of which so many vectors are kept.
    HeldOut { source: LayerInput, input: Tensor, vectors: i64 },
    /// The input of `layer` and what its output lacks: the output of the dense network less that of
    /// the compressed one.
    Residual { source: LayerInput, layer: String, input: Tensor, residual: Tensor, weight: f64 },
}

impl Seen {
    /// The input that it was.
    pub(super) fn source(&self) -> &LayerInput {
        match self {
            Seen::Summed { source, .. } | Seen::HeldOut { source, .. } | Seen::Residual { source, .. } => source,
        }
    }
}

/// How a batch of samples counts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum BatchUse {
    /// It is summed with this weight.
    Summed { weight: f64 },
    /// It is held out of the sums, and so many vectors of each input are kept.
    HeldOut { vectors: i64 },
}

/// The layers that are watched. Layers that are given the same tensor share an input.
#[derive(Debug)]
pub(super) struct Watched {
    /// Each input, with the name of the layer that is first given it.
    inputs: BTreeMap<LayerInput, String>,
    /// The layers that have a dense target.
    targets: BTreeSet<String>,
    /// Whether a forward ends as soon as nothing is left to be seen.
    ends_early: bool,
}

impl Watched {
    /// Watches the inputs of `layers`, in execution order, and their output residuals if they are
    /// fitted to the outputs of the dense network.
    pub(super) fn of<'a>(layers: impl IntoIterator<Item = &'a Layer>, has_target: bool) -> Self {
        let mut watched = Watched { inputs: BTreeMap::new(), targets: BTreeSet::new(), ends_early: false };
        for layer in layers {
            watched.inputs.entry(layer.input().clone()).or_insert_with(|| layer.name().to_owned());
            if has_target {
                watched.targets.insert(layer.name().to_owned());
            }
        }
        watched
    }

    /// Ends forwards with [`Error::SeenEnough`] once the single input, or the outputs of its layers
    /// where they have a dense target, have been seen.
    pub(super) fn ending_early(self) -> Self {
        Watched { ends_early: true, ..self }
    }
}

/// The observer of one batch: it hands what it sees to `take`, whose errors end the forward.
pub(super) struct Watcher<'a> {
    watched: &'a Watched,
    batch: BatchUse,
    /// The dense outputs for the batch.
    targets: DenseOutputs,
    /// The layers under way that have a dense target.
    under_way: BTreeMap<String, UnderWay>,
    take: &'a mut dyn FnMut(Seen) -> Result<()>,
}

/// A layer that is about to compute its output.
#[derive(Debug, Default)]
struct UnderWay {
    input: Option<Tensor>,
    /// The tensor that the network adds to the output.
    residual: Option<Tensor>,
}

impl<'a> Watcher<'a> {
    /// `targets` are the dense outputs of all layers that have a dense target.
    pub(super) fn new(
        watched: &'a Watched,
        batch: BatchUse,
        targets: DenseOutputs,
        take: &'a mut dyn FnMut(Seen) -> Result<()>,
    ) -> Self {
        Watcher { watched, batch, targets, under_way: BTreeMap::new(), take }
    }

    /// The weight of the batch if the layer's output residual is summed.
    fn weight_of_residual(&self, layer: &Layer) -> Option<f64> {
        match self.batch {
            BatchUse::Summed { weight } => self.watched.targets.contains(layer.name()).then_some(weight),
            BatchUse::HeldOut { .. } => None,
        }
    }

    fn end_if(&self, nothing_is_left: bool) -> Result<()> {
        if self.watched.ends_early && nothing_is_left { Err(Error::SeenEnough) } else { Ok(()) }
    }
}

impl Observer for Watcher<'_> {
    fn input(&mut self, layer: &Layer, input: &Tensor) -> Result<()> {
        let Some(first) = self.watched.inputs.get(layer.input()) else { return Ok(()) };
        if first == layer.name() {
            let (source, input) = (layer.input().clone(), input.shallow_clone());
            (self.take)(match self.batch {
                BatchUse::Summed { weight } => Seen::Summed { source, input, weight },
                BatchUse::HeldOut { vectors } => Seen::HeldOut { source, input, vectors },
            })?;
        }
        if self.weight_of_residual(layer).is_some() {
            self.under_way.entry(layer.name().to_owned()).or_default().input = Some(input.shallow_clone());
        }
        self.end_if(matches!(self.batch, BatchUse::HeldOut { .. }) || self.watched.targets.is_empty())
    }

    fn residual(&mut self, layer: &Layer, residual: &Tensor) -> Result<()> {
        if self.weight_of_residual(layer).is_some() {
            self.under_way.entry(layer.name().to_owned()).or_default().residual = Some(residual.shallow_clone());
        }
        Ok(())
    }

    fn output(&mut self, layer: &Layer, output: &Tensor) -> Result<()> {
        let Some(weight) = self.weight_of_residual(layer) else { return Ok(()) };
        let UnderWay { input, residual } = self.under_way.remove(layer.name()).expect("a layer's input precedes its output");
        let input = input.expect("a layer's input precedes its output");
        let mut target = self.targets.take(layer.name()).expect("the dense network has run the same layers before");
        let residual = target.f_sub_(&with_residual(output, residual.as_ref())?)?;
        let source = layer.input().clone();
        (self.take)(Seen::Residual { source, layer: layer.name().to_owned(), input, residual, weight })?;
        self.end_if(self.targets.is_empty())
    }
}
