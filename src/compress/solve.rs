//! The visitor that compresses: it solves the layers of every stop and stores them.

use sdxl_model::{Layer, LayerInput};
use squeeze_base::allocator;
use squeeze_base::error::{Error, Result};
use squeeze_base::progress::{Progress, Task};
use squeeze_solver::{Factor, Hessian, JointFactors};

use super::gather::Gatherer;
use super::layer::{CompressedLayer, Evidence};
use super::one_layer::compress_layer;
use super::report::LayerReport;
use super::walk::{Visitor, Walk};
use super::workspace::Workspace;
use crate::plan::{Stop, Then};
use crate::recipe::{LayerRecipe, LayerRecipes};

/// Compresses the layers of every stop and adds them to a workspace. Layers that the workspace has
/// already are not compressed again.
pub(super) struct Compressor<'a> {
    pub layers: &'a LayerRecipes,
    /// Bytes for layers of one shape whose factors are there at once, and which a GPU without
    /// kernels prunes in one batch; 0 solves them input by input.
    pub batch_bytes: u64,
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
            match gathered {
                Some(gatherer) => self.solve_gathered(stop, &inputs, gatherer, walk, &task)?,
                None => {
                    for input in &inputs {
                        let hessian = walk.shared().hessian(input);
                        let hessian = hessian.expect("text and time are summed before the first stage");
                        self.solve_input(stop, input, Sums { hessian, gatherer: None }, walk, &task)?;
                    }
                }
            }
        }
        self.solve_without_hessians(stop, &layers, walk)?;
        // Layers of a stage that stays dense are needed when it is left.
        if stop.then == Then::Stay { Ok(()) } else { self.store.hand_over() }
    }

    fn store(&self) -> Option<&Workspace> {
        Some(self.store)
    }
}

/// The sums that layers of one input are solved with.
#[derive(Clone, Copy)]
struct Sums<'a> {
    hessian: &'a Hessian,
    /// Has held-out vectors and corrections.
    gatherer: Option<&'a Gatherer>,
}

impl Compressor<'_> {
    /// Whether a layer is still to be compressed, with or without a Hessian.
    pub(super) fn is_open(&self, layer: &Layer, with_hessian: bool) -> bool {
        let recipe = self.layers.get(layer.name());
        recipe.is_some_and(|recipe| recipe.needs_hessian() == with_hessian) && !self.store.has(layer.name())
    }

    /// The recipe of a layer that is part of a stop.
    pub(super) fn recipe(&self, layer: &Layer) -> &LayerRecipe {
        self.layers.get(layer.name()).expect("a stop has only layers with a recipe")
    }

    fn solve_gathered(
        &mut self,
        stop: &Stop,
        inputs: &[LayerInput],
        mut gatherer: Gatherer,
        walk: &Walk<'_>,
        task: &Task<'_>,
    ) -> Result<()> {
        if self.batch_bytes > 0 && stop.then == Then::Stay {
            self.solve_batches(stop, &gatherer, walk, task)?;
        }
        for input in inputs {
            // Each Hessian is dropped once its layers are solved.
            let hessian = gatherer.take(input)?.expect("the gatherer was asked for the open inputs");
            self.solve_input(stop, input, Sums { hessian: &hessian, gatherer: Some(&gatherer) }, walk, task)?;
        }
        Ok(())
    }

    /// Compresses the layers of one input. Its Hessian is factored once for all of them.
    fn solve_input(&mut self, stop: &Stop, input: &LayerInput, sums: Sums<'_>, walk: &Walk<'_>, task: &Task<'_>) -> Result<()> {
        let layers = walk.layers_of(stop);
        let layers: Vec<&Layer> =
            layers.into_iter().filter(|layer| layer.input() == input && self.is_open(layer, true)).collect();
        let Sums { hessian, gatherer } = sums;
        let mut factors = SharedFactors::default();
        for layer in &layers {
            task.go_on()?;
            task.advance(layer.name());
            // A layer alone makes its factors itself and drops them before the errors are computed.
            if layers.len() > 1 {
                factors.prepare(hessian, self.recipe(layer)).map_err(Error::layer(layer.name()))?;
            }
            let evidence = Evidence {
                hessian,
                pruned: None,
                factors: factors.sequential.as_ref().map(|(dampening, factors)| (*dampening, factors.as_slice())),
                joint: factors.joint.as_ref(),
                correction: gatherer.and_then(|gatherer| gatherer.correction(layer.name())),
                held_out: gatherer.and_then(|gatherer| gatherer.held_out(input)),
            };
            self.compress(stop, layer, walk, Some(evidence), task)?;
        }
        Ok(())
    }

    /// Compresses the layers that need no Hessian, with one weight in memory at a time.
    fn solve_without_hessians(&mut self, stop: &Stop, layers: &[&Layer], walk: &Walk<'_>) -> Result<()> {
        let open: Vec<&Layer> = layers.iter().copied().filter(|layer| self.is_open(layer, false)).collect();
        if open.is_empty() {
            return Ok(());
        }
        let task = Task::begin(self.progress, "layers", "layers", open.len());
        for layer in open {
            task.go_on()?;
            task.advance(layer.name());
            self.compress(stop, layer, walk, None, &task)?;
        }
        Ok(())
    }

    fn compress(
        &mut self,
        stop: &Stop,
        layer: &Layer,
        walk: &Walk<'_>,
        evidence: Option<Evidence<'_>>,
        task: &Task<'_>,
    ) -> Result<()> {
        let weight = walk.dense_weight(layer)?;
        let compressed =
            tracing::debug_span!("layer").in_scope(|| compress_layer(layer.name(), &weight, self.recipe(layer), evidence))?;
        if weight.numel() > LARGE && evidence.is_some() {
            allocator::give_back();
        }
        self.add(stop, layer, compressed, evidence, task)
    }

    /// Reports a compressed layer and adds it to the workspace.
    pub(super) fn add(
        &mut self,
        stop: &Stop,
        layer: &Layer,
        compressed: CompressedLayer,
        evidence: Option<Evidence<'_>>,
        task: &Task<'_>,
    ) -> Result<()> {
        let mut notes = Vec::new();
        for note in &compressed.notes {
            tracing::warn!("{}: {note}", layer.name());
            notes.push(format!("{}: {note}", layer.name()));
        }
        let vectors = evidence.map(|evidence| evidence.hessian.vectors());
        let report = LayerReport::of(layer, stop.part, &compressed, vectors);
        task.layer(report.progress());
        tracing::debug_span!("store").in_scope(|| self.store.push(report, notes, compressed.stored))
    }
}

/// Weights of more elements than this, with a Hessian and its factors, leave blocks in the
/// allocator that nothing else fits into.
const LARGE: usize = 4 << 20;

/// The factors of a Hessian that several layers share.
#[derive(Default)]
struct SharedFactors {
    /// For SparseGPT, with the dampening that was asked for.
    sequential: Option<(f64, Vec<Factor>)>,
    joint: Option<JointFactors>,
}

impl SharedFactors {
    /// Makes the factors that `recipe` needs, unless they are there.
    fn prepare(&mut self, hessian: &Hessian, recipe: &LayerRecipe) -> Result<()> {
        match (recipe.joint_options(), recipe.batch_options()) {
            (Some(options), _) => {
                let (dampening, order) = (options.dampening(), options.order());
                if self.joint.as_ref().is_none_or(|factors| !factors.fit(dampening, order)) {
                    // The old factors are dropped first: there may not be memory for both.
                    self.joint = None;
                    self.joint = Some(JointFactors::new(hessian, dampening, order)?);
                }
            }
            (None, Some(options)) => {
                if self.sequential.as_ref().is_none_or(|(dampening, _)| *dampening != options.dampening) {
                    self.sequential = Some((options.dampening, Factor::all(hessian, options.dampening)?));
                }
            }
            (None, None) => {}
        }
        Ok(())
    }
}
