//! The visitor that compresses: it solves the layers of every stop and stores them.

use sdxl_model::{Layer, LayerInput};
use squeeze_base::allocator;
use squeeze_base::error::Result;
use squeeze_base::progress::{Progress, Task};
use squeeze_solver::{Hessian, OutputMetric, OutputResidual, has_kernels};
use tch::Tensor;

use super::gather::Gatherer;
use super::output_metrics::OutputMetrics;
use super::problem::{Problem, SharedFactors, Solved, Sums};
use super::report::LayerReport;
use super::team::Team;
use super::walk::{Visitor, Walk};
use super::workspace::Workspace;
use crate::geometry::input_geometry;
use crate::plan::{Stop, Then, solving_bytes};
use crate::recipe::{LayerRecipe, LayerRecipes};

/// Compresses the layers of every stop and adds them to a workspace. Layers that the workspace has
/// already are not compressed again.
pub(super) struct Compressor<'a> {
    pub layers: &'a LayerRecipes,
    /// The metrics of the outputs of layers that are polished by them.
    pub metrics: &'a OutputMetrics,
    /// The devices that solve.
    pub team: Team<'a>,
    pub store: &'a mut Workspace,
    pub progress: &'a dyn Progress,
}

impl Visitor for Compressor<'_> {
    fn open_inputs(&self, stop: &Stop, walk: &Walk<'_>) -> Vec<LayerInput> {
        let layers = walk.layers_of(stop);
        let is_open = |input: &&LayerInput| layers.iter().any(|layer| layer.input() == *input && self.is_open(layer, true));
        stop.gather.inputs().iter().filter(is_open).cloned().collect()
    }

    fn solve(&mut self, stop: &Stop, gathered: Option<Gatherer>, walk: &Walk<'_>) -> Result<()> {
        let layers = walk.layers_of(stop);
        let inputs = self.open_inputs(stop, walk);
        if !inputs.is_empty() {
            let of_inputs = layers.iter().filter(|layer| inputs.contains(layer.input()));
            let task = Task::begin(self.progress, "layers", "layers", of_inputs.count());
            let are_slow_alone = self.team.spare_bytes > 0 && self.team.devices.iter().all(|device| !has_kernels(*device));
            if let (Some(gatherer), true, Then::Stay) = (&gathered, are_slow_alone, stop.then) {
                self.solve_batches(stop, gatherer, walk, &task)?;
            }
            self.solve_inputs(stop, &inputs, gathered, walk, &task)?;
        }
        self.solve_without_hessians(stop, &layers, walk)?;
        // Layers of a stage that stays dense are needed when it is left.
        if stop.then == Then::Stay { Ok(()) } else { self.store.hand_over() }
    }

    fn store(&self) -> Option<&Workspace> {
        Some(self.store)
    }
}

/// The sums of the input whose layers are being solved.
struct OfInput {
    /// The input's place in the list.
    index: usize,
    hessian: Hessian,
    factors: SharedFactors,
    held_out: Option<Tensor>,
}

impl OfInput {
    /// Takes the sums of an input out of `gathered`, or, for text and time, those of the walk.
    fn new(index: usize, input: &LayerInput, gathered: Option<&mut Gatherer>, walk: &Walk<'_>) -> Result<Self> {
        let factors = SharedFactors::default();
        Ok(match gathered {
            Some(gatherer) => {
                let hessian = gatherer.take(input)?.expect("the gatherer was asked for the open inputs");
                OfInput { index, hessian, factors, held_out: gatherer.take_held_out(input) }
            }
            None => {
                let shared = walk.shared().hessian(input).expect("text and time are summed before the first stage");
                OfInput { index, hessian: shared.to_device(shared.device())?, factors, held_out: None }
            }
        })
    }

    /// Handles to the sums for a layer with this correction, and the metric of its outputs if it
    /// has one Hessian.
    fn share(&self, correction: Option<OutputResidual>, metric: Option<&OutputMetric>) -> Result<Sums> {
        let device = self.hessian.device();
        Ok(Sums {
            hessian: self.hessian.to_device(device)?,
            factors: self.factors.to_device(device)?,
            correction,
            metric: metric.filter(|_| self.hessian.groups() == 1).cloned(),
            held_out: self.held_out.as_ref().map(Tensor::shallow_clone),
        })
    }
}

impl Compressor<'_> {
    /// Whether a layer is still to be compressed, with or without a Hessian.
    pub(super) fn is_open(&self, layer: &Layer, with_hessian: bool) -> bool {
        let recipe = self.layers.get(layer.name());
        recipe.is_some_and(|recipe| recipe.needs_hessian() == with_hessian) && !self.store.has(layer.name())
    }

    /// The recipe of a layer that is part of a stop.
    pub(super) fn recipe(&self, layer: &Layer) -> &LayerRecipe {
        recipe_of(self.layers, layer)
    }

    /// Compresses the open layers of `inputs`, input by input. `gathered` has the Hessians of
    /// inputs that the samples ran for. A Hessian is factored once for all of its layers, and
    /// dropped once they are solved.
    fn solve_inputs(
        &mut self,
        stop: &Stop,
        inputs: &[LayerInput],
        mut gathered: Option<Gatherer>,
        walk: &Walk<'_>,
        task: &Task<'_>,
    ) -> Result<()> {
        let layers = walk.layers_of(stop);
        let of_input = |input: &LayerInput| -> Vec<&Layer> {
            layers.iter().copied().filter(|layer| layer.input() == input && self.is_open(layer, true)).collect()
        };
        let by_input: Vec<Vec<&Layer>> = inputs.iter().map(of_input).collect();
        let open: Vec<(usize, &Layer)> =
            by_input.iter().enumerate().flat_map(|(index, layers)| layers.iter().map(move |layer| (index, *layer))).collect();
        let (recipes, metrics, team) = (self.layers, self.metrics, self.team);
        let hessians_wait = gathered.as_ref().is_some_and(Gatherer::has_waiting);
        let mut current: Option<OfInput> = None;
        let mut problems = open.iter().enumerate().map(|(number, (index, layer))| {
            task.go_on()?;
            task.advance(layer.name());
            let of_input = match current.take().filter(|current| current.index == *index) {
                Some(same) => current.insert(same),
                None => current.insert(OfInput::new(*index, &inputs[*index], gathered.as_mut(), walk)?),
            };
            let recipe = recipe_of(recipes, layer);
            // A layer alone makes its factors itself and drops them before the errors are computed.
            if by_input[*index].len() > 1 {
                of_input.factors.prepare(&of_input.hessian, layer.name(), recipe)?;
            }
            let correction = gathered.as_mut().and_then(|gatherer| gatherer.take_correction(layer.name()));
            let (geometry, shape) = (input_geometry(layer), layer.weight().size());
            // A Hessian that has waited is on the device for its layers only.
            let hessian_bytes = if hessians_wait { Hessian::bytes(geometry, &shape) } else { 0 };
            Ok(Problem {
                name: layer.name().to_owned(),
                weight: walk.dense_weight(layer)?,
                recipe,
                sums: Some(of_input.share(correction, metrics.get(layer.name()))?),
                place: team.place(of_input.hessian.device(), number, inputs.len()),
                bytes: hessian_bytes + solving_bytes(geometry, &shape, recipe, of_input.hessian.device()),
            })
        });
        let mut solved = open.iter().map(|(_, layer)| *layer);
        team.solve(&mut problems, &mut |result| {
            let layer = solved.next().expect("there are as many results as layers");
            if layer.weight().numel() > LARGE {
                allocator::give_back();
            }
            self.add(stop, layer, result, task)
        })
    }

    /// Compresses the layers that need no Hessian. On a CPU one weight at a time is in memory.
    fn solve_without_hessians(&mut self, stop: &Stop, layers: &[&Layer], walk: &Walk<'_>) -> Result<()> {
        let open: Vec<&Layer> = layers.iter().copied().filter(|layer| self.is_open(layer, false)).collect();
        if open.is_empty() {
            return Ok(());
        }
        let task = Task::begin(self.progress, "layers", "layers", open.len());
        let (recipes, team) = (self.layers, self.team);
        let mut problems = open.iter().enumerate().map(|(number, layer)| {
            task.go_on()?;
            task.advance(layer.name());
            let recipe = recipe_of(recipes, layer);
            let place = number % team.devices.len();
            let bytes = solving_bytes(input_geometry(layer), &layer.weight().size(), recipe, team.devices[place]);
            Ok(Problem { name: layer.name().to_owned(), weight: walk.dense_weight(layer)?, recipe, sums: None, place, bytes })
        });
        let mut solved = open.iter();
        team.solve(&mut problems, &mut |result| {
            let layer = solved.next().expect("there are as many results as layers");
            self.add(stop, layer, result, &task)
        })
    }

    /// Reports a compressed layer and adds it to the workspace.
    pub(super) fn add(&mut self, stop: &Stop, layer: &Layer, solved: Solved, task: &Task<'_>) -> Result<()> {
        let Solved { compressed, vectors } = solved;
        let notes = compressed.notes.iter().map(|note| format!("{}: {note}", layer.name())).collect();
        let report = LayerReport::of(layer, stop.part, &compressed, vectors);
        task.layer(report.progress());
        tracing::debug_span!("store").in_scope(|| self.store.push(report, notes, compressed.stored))
    }
}

/// The recipe of a layer that is part of a stop.
fn recipe_of<'a>(layers: &'a LayerRecipes, layer: &Layer) -> &'a LayerRecipe {
    layers.get(layer.name()).expect("a stop has only layers with a recipe")
}

/// Weights of more elements than this, with a Hessian and its factors, leave blocks in the
/// allocator that nothing else fits into.
const LARGE: usize = 4 << 20;
