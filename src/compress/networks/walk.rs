//! The samples on their way through a text encoder or a half of a VAE, and the layers that are
//! solved on the way.

use std::ops::Range;

use sdxl_model::checkpoint::TensorSource;
use sdxl_model::{Layer, LayerInput, Pieces, States, Unobserved};
use squeeze_base::error::{Error, Result};
use squeeze_base::progress::{Progress, Task};
use squeeze_container::CompressedWeight;
use tch::{Device, Tensor};

use crate::calibration::is_held_out;
use crate::compress::dense_outputs::DenseOutputs;
use crate::compress::forward::unless_ended_early;
use crate::compress::gather::{Gatherer, HELD_OUT_VECTORS};
use crate::compress::problem::{Problem, SharedFactors, Solved, Sums};
use crate::compress::report::LayerReport;
use crate::compress::watcher::{BatchUse, Watched, Watcher};
use crate::compress::workspace::Workspace;
use crate::recipe::{LayerRecipe, LayerRecipes, Sequencing};

/// How the layers of a network are compressed.
pub(super) struct Solving<'a> {
    pub recipes: &'a LayerRecipes,
    /// What weights are read from one at a time, where the network is not loaded.
    pub source: Option<&'a dyn TensorSource>,
    pub sequencing: Sequencing,
    pub device: Device,
    pub progress: &'a dyn Progress,
}

/// Samples, all at the same piece of a network.
#[derive(Default)]
pub(super) struct Samples {
    /// Those of the compressed network.
    pub states: Vec<States>,
    /// Those of the dense network, where layers are fitted to its outputs; else none.
    pub dense: Vec<States>,
}

impl Solving<'_> {
    /// Compresses the layers of `net` that `store` does not have yet, piece by piece. `samples` are
    /// before the first piece; there may be none if no layer needs calibration.
    ///
    /// # Errors
    /// If a layer cannot be compressed, or activations become NaN or infinite; [`Error::Stopped`].
    /// Finished layers are kept.
    pub(super) fn run(&self, net: &mut dyn Pieces, samples: Samples, store: &mut Workspace) -> Result<()> {
        let ended = self.walk(net, samples, store);
        // Layers that were finished before an error are kept.
        let flushed = store.flush();
        ended.and(flushed)
    }

    fn walk(&self, net: &mut dyn Pieces, mut samples: Samples, store: &mut Workspace) -> Result<()> {
        let pieces = net.pieces();
        let task = Task::begin(self.progress, "compressing", "pieces", pieces.len());
        let is_open = |store: &Workspace, layer: &Layer| self.recipes.contains_key(layer.name()) && !store.has(layer.name());
        for (index, (name, range)) in pieces.iter().enumerate() {
            task.go_on()?;
            task.stage(name, index, pieces.len());
            let during = |what: &'static str| move |error: Error| error.during(&format!("{what} of `{name}`"));
            let mut own = DenseWeights::of(&net.layers()[range.clone()]);
            for stop in stops(net.layers(), range, self.sequencing) {
                if stop.iter().any(|layer| is_open(store, &net.layers()[*layer])) {
                    let open: Vec<usize> = stop.iter().copied().filter(|layer| is_open(store, &net.layers()[*layer])).collect();
                    let gathered =
                        self.gather(net, (index, range), &samples, (&open, &mut own)).map_err(during("the Hessians"))?;
                    let open: Vec<&Layer> = open.iter().map(|layer| &net.layers()[*layer]).collect();
                    self.solve(name, &open, gathered, store, &task).map_err(during("the layers"))?;
                    store.hand_over()?;
                }
                self.install(net, &stop, store)?;
            }
            let later = pieces[index + 1..].iter().flat_map(|(_, range)| &net.layers()[range.clone()]);
            if later.into_iter().any(|layer| is_open(store, layer) && self.recipes[layer.name()].needs_hessian()) {
                for state in &mut samples.states {
                    state.hidden = net.run_piece(index, state.shallow_clone(), &mut Unobserved).map_err(during("the outputs"))?;
                }
                own.exchange(&mut net.layers_mut()[range.clone()])?;
                for state in &mut samples.dense {
                    state.hidden = net.run_piece(index, state.shallow_clone(), &mut Unobserved).map_err(during("the outputs"))?;
                }
                own.exchange(&mut net.layers_mut()[range.clone()])?;
            }
        }
        Ok(())
    }

    /// The Hessians of the inputs of `open` layers, which are of the piece `index` with the layers
    /// `range`, and what their outputs lack of the dense network's. `own` are the piece's dense
    /// weights.
    fn gather(
        &self,
        net: &mut dyn Pieces,
        (index, range): (usize, &Range<usize>),
        Samples { states, dense }: &Samples,
        (open, own): (&[usize], &mut DenseWeights),
    ) -> Result<Gatherer> {
        let needs_hessian = |layer: &&Layer| self.recipes[layer.name()].needs_hessian();
        let wanted: Vec<&Layer> = open.iter().map(|index| &net.layers()[*index]).filter(needs_hessian).collect();
        let mut gatherer = match dense.is_empty() {
            true => Gatherer::new(wanted.iter().copied(), self.device)?,
            false => Gatherer::with_targets(wanted.iter().copied(), self.device)?,
        };
        if wanted.is_empty() {
            return Ok(gatherer);
        }
        if states.is_empty() {
            return Err(Error::Argument("calibration needs samples, and there are none".into()));
        }
        let inputs = inputs_of(&wanted);
        // All layers of these inputs: the first of them shows the input, compressed or not.
        let watched = Watched::of(net.layers()[range.clone()].iter().filter(|layer| inputs.contains(&layer.input())), false);
        let watched = if inputs.len() == 1 { watched.ending_early() } else { watched };
        let names: Vec<String> = wanted.iter().map(|layer| layer.name().to_owned()).collect();
        let watched = if dense.is_empty() { watched } else { watched.fitted(&names) };
        for (number, state) in states.iter().enumerate() {
            let mut targets = DenseOutputs::default();
            let batch = match is_held_out(number, states.len()) {
                true => BatchUse::HeldOut { vectors: HELD_OUT_VECTORS },
                false => BatchUse::Summed { weight: 1.0 },
            };
            if let (Some(dense), BatchUse::Summed { .. }) = (dense.get(number), batch) {
                targets = DenseOutputs::of(names.clone()).ending_early();
                own.exchange(&mut net.layers_mut()[range.clone()])?;
                unless_ended_early(net.run_piece(index, dense.shallow_clone(), &mut targets))?;
                own.exchange(&mut net.layers_mut()[range.clone()])?;
            }
            let mut take = |seen| gatherer.add_seen(seen);
            let mut watcher = Watcher::new(&watched, batch, targets, &mut take);
            unless_ended_early(net.run_piece(index, state.shallow_clone(), &mut watcher))?;
        }
        Ok(gatherer)
    }

    /// Compresses `open` layers, input by input, and adds them to `store`.
    fn solve(&self, piece: &str, open: &[&Layer], mut gathered: Gatherer, store: &mut Workspace, task: &Task<'_>) -> Result<()> {
        for input in inputs_of(open) {
            let layers: Vec<&Layer> = open.iter().copied().filter(|layer| layer.input() == input).collect();
            let hessian = gathered.take(input)?;
            let held_out = gathered.take_held_out(input);
            let mut factors = SharedFactors::default();
            for layer in layers {
                task.go_on()?;
                let recipe = &self.recipes[layer.name()];
                let sums = match &hessian {
                    Some(hessian) if recipe.needs_hessian() => {
                        factors.prepare(hessian, layer.name(), recipe)?;
                        Some(Sums {
                            hessian: hessian.to_device(self.device)?,
                            factors: factors.to_device(self.device)?,
                            correction: gathered.take_correction(layer.name()),
                            metric: None,
                            held_out: held_out.as_ref().map(Tensor::shallow_clone),
                        })
                    }
                    Some(_) | None => None,
                };
                let weight = match self.source {
                    Some(source) => source.tensor(&format!("{}.weight", layer.name()), &layer.weight().size())?,
                    None => layer.weight().shallow_clone(),
                };
                let solved = solved(layer.name(), weight, recipe, sums, self.device)?;
                let (shape, compressed) = (layer.weight().size(), &solved.compressed);
                let report = LayerReport::new(layer.name(), piece.to_owned(), shape, compressed, solved.vectors);
                add(report, solved, store, task)?;
            }
        }
        Ok(())
    }

    /// Replaces the weights of the layers `stop` by those that `store` has.
    fn install(&self, net: &mut dyn Pieces, stop: &[usize], store: &Workspace) -> Result<()> {
        if self.source.is_some() {
            return Ok(());
        }
        for index in stop {
            let layer = &mut net.layers_mut()[*index];
            if !store.has(layer.name()) {
                continue;
            }
            if let Some(weight) = store.weight(layer.name())? {
                let decoded = decoded(&weight)?.f_to_kind(layer.weight().f_kind()?)?;
                layer.replace_weight(&decoded)?;
            }
        }
        Ok(())
    }
}

/// The dense weights of a piece's layers, of which some have their compressed ones.
struct DenseWeights(Vec<Tensor>);

impl DenseWeights {
    /// The weights of layers that all have their own.
    fn of(layers: &[Layer]) -> Self {
        DenseWeights(layers.iter().map(|layer| layer.weight().shallow_clone()).collect())
    }

    /// Puts these weights into `layers`, and keeps those that they had: a second exchange undoes
    /// the first. No weight is copied.
    fn exchange(&mut self, layers: &mut [Layer]) -> Result<()> {
        for (own, layer) in self.0.iter_mut().zip(layers) {
            let weight = std::mem::replace(own, layer.weight().shallow_clone());
            layer.replace_weight(&weight)?;
        }
        Ok(())
    }
}

/// The layers of a piece that are solved together: all of them, or those that are given one
/// input.
pub(super) fn stops(layers: &[Layer], range: &Range<usize>, sequencing: Sequencing) -> Vec<Vec<usize>> {
    let mut stops: Vec<Vec<usize>> = Vec::new();
    for index in range.clone() {
        let joins = |stop: &Vec<usize>| match sequencing {
            Sequencing::Stage => true,
            Sequencing::Sublayer { .. } => layers[stop[0]].input() == layers[index].input(),
        };
        match stops.last_mut().filter(|stop| joins(stop)) {
            Some(stop) => stop.push(index),
            None => stops.push(vec![index]),
        }
    }
    stops
}

/// The inputs of `layers`, each once, in the order of the layers.
fn inputs_of<'a>(layers: &[&'a Layer]) -> Vec<&'a LayerInput> {
    let mut inputs: Vec<&LayerInput> = Vec::new();
    for layer in layers {
        if !inputs.contains(&layer.input()) {
            inputs.push(layer.input());
        }
    }
    inputs
}

/// Compresses a weight [o, ...].
///
/// # Errors
/// As [`compress_layer`](crate::compress::compress_layer).
pub(super) fn solved(name: &str, weight: Tensor, recipe: &LayerRecipe, sums: Option<Sums>, device: Device) -> Result<Solved> {
    Problem { name: name.to_owned(), weight, recipe, sums, place: 0, bytes: 0 }.solve(device)
}

/// Reports a compressed layer and adds it to `store`.
pub(super) fn add(report: LayerReport, solved: Solved, store: &mut Workspace, task: &Task<'_>) -> Result<()> {
    let named = |note: &String| format!("{}: {note}", report.name);
    let notes = solved.compressed.notes.iter().map(named).collect();
    task.layer(report.progress());
    store.push(report, notes, solved.compressed.stored)
}

/// A compressed weight as a tensor in fp16.
pub(super) fn decoded(weight: &CompressedWeight) -> Result<Tensor> {
    Ok(Tensor::f_from_slice(&weight.decode()?)?.f_view(weight.shape.as_slice())?)
}
