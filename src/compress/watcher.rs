//! Watching layers while one batch of samples runs.

use std::collections::{BTreeMap, BTreeSet};

use sdxl_model::{Layer, LayerInput, Observer};
use squeeze_base::error::{Error, Result};
use squeeze_numerics::finite::is_finite;
use tch::{Kind, Tensor};

use super::dense_outputs::{DenseOutputs, with_residual};

/// What a layer was given in a batch, with its place in the sums.
#[derive(Debug)]
pub(super) enum Seen {
    /// An input that is summed, times the square root of its weight.
    Summed { source: LayerInput, input: Tensor },
    /// An input of which so many vectors are kept.
    HeldOut { source: LayerInput, input: Tensor, vectors: i64 },
    /// The input of `layer` and what its output lacks, times its weight: the output of the dense
    /// network less that of the compressed one.
    Residual { source: LayerInput, layer: String, input: Tensor, residual: Tensor },
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

    /// The same inputs, and the output residuals of `layers` alone, by name.
    pub(super) fn fitted(self, layers: &[String]) -> Self {
        Watched { targets: layers.iter().cloned().collect(), ..self }
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
    /// What a checked forward has handed on so far; `None` if forwards are not checked.
    handed_on: Option<HandedOn>,
    take: &'a mut dyn FnMut(Seen) -> Result<()>,
}

/// The parts of a batch that were handed on.
#[derive(Debug, Default)]
struct HandedOn {
    inputs: BTreeSet<LayerInput>,
    residuals: BTreeSet<String>,
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
        Watcher { watched, batch, targets, under_way: BTreeMap::new(), handed_on: None, take }
    }

    /// Hands on nothing that is not finite, on any device: such a forward ends with
    /// [`Error::NotFinite`]. A forward of the same batch can then take its place: what the first
    /// one handed on is not handed on again.
    pub(super) fn check(&mut self) {
        self.handed_on = Some(HandedOn::default());
    }

    /// The weight of the batch if the layer's output residual is still to be summed.
    fn weight_of_residual(&self, layer: &Layer) -> Option<f64> {
        let is_known = self.handed_on.as_ref().is_some_and(|known| known.residuals.contains(layer.name()));
        match self.batch {
            BatchUse::Summed { weight } => (!is_known && self.watched.targets.contains(layer.name())).then_some(weight),
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
        let is_known = self.handed_on.as_ref().is_some_and(|known| known.inputs.contains(layer.input()));
        if first == layer.name() && !is_known {
            let source = layer.input().clone();
            let input = match self.batch {
                BatchUse::Summed { weight } if weight != 1.0 => input.f_mul_scalar(weight.sqrt())?,
                BatchUse::Summed { .. } | BatchUse::HeldOut { .. } => input.shallow_clone(),
            };
            if let Some(known) = &mut self.handed_on {
                check_finite(layer, "input", &input)?;
                known.inputs.insert(source.clone());
            }
            (self.take)(match self.batch {
                BatchUse::Summed { .. } => Seen::Summed { source, input },
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
        let ours = with_residual(output, residual.as_ref())?;
        let mut residual = match &mut self.handed_on {
            None => target.f_sub_(&ours)?,
            Some(known) => {
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
                known.residuals.insert(layer.name().to_owned());
                difference
            }
        };
        if weight != 1.0 {
            residual = residual.f_mul_scalar_(weight)?;
        }
        let source = layer.input().clone();
        (self.take)(Seen::Residual { source, layer: layer.name().to_owned(), input, residual })?;
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
