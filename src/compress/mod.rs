//! Compresses a UNet stage by stage along its chain.
//!
//! For each stage: the Hessians of its layers on the outputs of the stages already compressed, then each layer pruned and palettized,
//! then the compressed stage's outputs go on. What stands before and after the stages is treated likewise. What is finished lies in the [`Workspace`]; nothing of a finished stage stays in memory.

mod allocate;
mod batch;
mod captions;
mod carries;
mod gather;
mod head;
mod identity;
mod job;
mod kept;
mod lane;
mod layer;
mod prepare;
mod workspace;

use std::collections::BTreeMap;
use std::path::Path;

use tch::{Device, Kind, Tensor};

pub use allocate::{Allocation, Choice, choose};
pub use gather::Gatherer;
pub use identity::BUILD;
pub use job::{JobReport, run, workspace_folder};
pub use layer::{Evidence, LayerErrors, Treated, treat};
pub use prepare::{Prepared, plan_of_run};
pub use workspace::Workspace;

use crate::allocator;
use crate::calibration::Samples;
use crate::checkpoint::{Blueprint, TensorSource};
use crate::container::CompressedWeight;
use crate::device::Placement;
use crate::error::{Error, Result};
use crate::model::unet::{Stage, StageSpec, UnetChain};
use crate::model::{Layer, LayerInput};
use crate::number;
use crate::plan::{Plan, StagePlan};
use crate::progress::{Progress, Task};
use crate::recipe::{LayerRecipe, LayerRecipes, Recipe, RunOptions, Sequencing};
use crate::solver::{Correction, Factor, Hessian, JointFactors};
use lane::{Lane, Pass, Way};

/// A treated layer.
#[derive(Debug, Clone, serde::Serialize, serde::Deserialize)]
pub struct LayerReport {
    /// The checkpoint name, without `.weight`.
    pub name: String,
    /// The stage, or `head` or `tail`.
    pub stage: String,
    /// The weight's shape.
    pub shape: Vec<i64>,
    /// Pruned share of the weight.
    pub sparsity: f64,
    /// Stored bits a weight, with palettes and scales.
    pub bits_per_weight: f64,
    /// Stored bytes.
    pub bytes: u64,
    /// Vectors that its Hessian was made of; absent where none was needed.
    pub vectors: Option<u64>,
    /// What it cost.
    pub errors: LayerErrors,
}

/// A UNet and what is to be done to it.
pub struct Job<'a> {
    /// What it consists of.
    pub chain: &'a UnetChain,
    /// Its dense weights, on the first device.
    pub source: &'a (dyn TensorSource + Sync),
    /// What is done to its layers.
    pub recipes: &'a LayerRecipes,
    /// How: waves, and where carries wait.
    pub plan: &'a Plan,
    /// When the layers of a stage learn of each other.
    pub sequencing: Sequencing,
    /// The dtype of activations.
    pub kind: Kind,
    /// How much each sample counts; empty: all the same.
    pub weights: &'a [f64],
    /// Timesteps of training: of the layers that see nothing but the time, each is an input.
    pub timesteps: usize,
    /// Where stages run: samples are spread over them, and the first one solves. At least one.
    pub devices: &'a [Device],
}

/// Compresses a UNet; what `finished` has already is not done again.
///
/// `samples` are needed if a recipe needs Hessians. Otherwise no forward is run at all, and one weight at a time is in memory. What
/// `captions` has gathered already is added to what samples tell of text and time.
///
/// # Errors
/// If a layer cannot be treated, activations become NaN or infinite, or there are no samples where some are needed;
/// [`Error::Stopped`] when the progress says so, after the layer at hand. In every case finished layers are kept.
pub fn compress(
    job: &Job,
    samples: &Samples,
    captions: Gatherer,
    finished: &mut Workspace,
    progress: &dyn Progress,
) -> Result<()> {
    let ended = job.stages(samples, captions, finished, progress);
    let flushed = finished.flush();
    ended.and(flushed)
}

impl Job<'_> {
    fn stages(&self, samples: &Samples, captions: Gatherer, finished: &mut Workspace, progress: &dyn Progress) -> Result<()> {
        let task = Task::begin(progress, "compressing", "parts", self.chain.stages().len() + 2);
        let blueprint = Blueprint::default();
        if samples.calls.is_empty() && self.recipes.values().any(LayerRecipe::needs_hessian) {
            return Err(Error::Argument("calibration needs samples, and there are none".into()));
        }
        task.advance("head");
        self.head(samples, finished, progress)?;

        // The last stage of which a layer still needs a Hessian, or their number for what comes after them: until there the samples must go.
        let outlines = self.chain.stages().iter().map(|spec| spec.load(&blueprint)).collect::<Result<Vec<_>>>()?;
        let open = |layer: &Layer| !finished.has(layer.name()) && self.needs_hessian(layer);
        let last = outlines.iter().rposition(|stage| stage.layers().iter().any(open));
        let tail = self.chain.load_tail(&blueprint)?;
        let last = if tail.layers().iter().any(open) { Some(outlines.len()) } else { last };
        let mut lanes = Vec::new();
        let mut shared = Gatherer::default();
        if last.is_some() {
            let layers = outlines.iter().flat_map(|stage| stage.layers()).filter(|layer| open(layer));
            lanes = self.lanes(finished.folder())?;
            shared = self.first_carries(&mut lanes, samples, layers, Some(finished), progress)?;
            shared.merge(captions)?;
        }
        for (index, (spec, plan)) in self.chain.stages().iter().zip(&self.plan.stages).enumerate() {
            let name = spec.name().to_string();
            task.advance(&name);
            if last.is_some_and(|last| index <= last) {
                let go_on = last != Some(index);
                match self.sequencing {
                    Sequencing::Stage => {
                        self.stage((spec, &outlines[index]), plan, &mut lanes, &shared, go_on, finished, progress)?
                    }
                    Sequencing::Sublayer { .. } => {
                        self.load(&mut lanes, spec)?;
                        self.sublayers(&name, &mut lanes, &shared, go_on, finished, progress)?;
                    }
                }
            } else {
                self.treat_alone(&name, outlines[index].layers(), finished, progress)?;
            }
        }

        task.advance("tail");
        if last == Some(outlines.len()) {
            lanes.iter_mut().try_for_each(|lane| lane.load_tail(self.chain, self.source))?;
            return self.sublayers("tail", &mut lanes, &shared, false, finished, progress);
        }
        self.treat_alone("tail", tail.layers(), finished, progress)
    }

    /// Treats those of `layers` that need no Hessian, one weight at a time.
    fn treat_alone(&self, part: &str, layers: &[Layer], finished: &mut Workspace, progress: &dyn Progress) -> Result<()> {
        let open: Vec<_> = layers
            .iter()
            .filter(|layer| !finished.has(layer.name()))
            .filter_map(|layer| Some((layer, self.recipes.get(layer.name())?)))
            .filter(|(_, recipe)| !recipe.needs_hessian())
            .collect();
        let task = Task::begin(progress, "layers", "layers", open.len());
        for (layer, recipe) in open {
            task.go_on()?;
            task.advance(layer.name());
            let weight = self.source.tensor(&format!("{}.weight", layer.name()), &layer.weight().size())?;
            finish(part, layer.name(), &weight, recipe, None, finished, &task)?;
        }
        Ok(())
    }

    /// Gathers, treats, and sends the carries through what has become of the stage.
    #[expect(clippy::too_many_arguments, reason = "all of them change from stage to stage")]
    fn stage(
        &self,
        (spec, outline): (&StageSpec, &Stage),
        plan: &StagePlan,
        lanes: &mut [Lane],
        shared: &Gatherer,
        go_on: bool,
        finished: &mut Workspace,
        progress: &dyn Progress,
    ) -> Result<()> {
        let name = spec.name().to_string();
        let layers: Vec<&Layer> = outline.layers().iter().collect();
        let mut open: Vec<LayerInput> = Vec::new();
        for layer in &layers {
            if self.needs_hessian(layer) && !finished.has(layer.name()) && !open.contains(layer.input()) {
                open.push(layer.input().clone());
            }
        }
        let features = plan.waves.iter().map(|wave| wave.iter().filter(|input| open.contains(input)).cloned().collect());
        for wave in features.filter(|wave: &Vec<LayerInput>| !wave.is_empty()) {
            self.load(lanes, spec)?;
            let pass = Pass { way: Way::Whole, inputs: &wave, hold: self.guards(), last: false };
            let mut gatherer = lane::gather(lanes, pass, &name, progress)?;
            // Factors are made in the place of the stage's weights.
            lanes.iter_mut().for_each(Lane::unload);
            let task = Task::begin(progress, "layers", "layers", self.count(&layers, &wave));
            if self.plan.batch_bytes > 0 {
                self.treat_batches(&name, &layers, &wave, &gatherer, finished, &task)?;
            }
            for input in wave {
                let hessian = gatherer.take(&input);
                let gathered = Gathered { held_out: gatherer.held_out(&input), ..Gathered::of(hessian.as_ref()) };
                self.treat_input(&name, (&layers, false), &input, gathered, finished, &task)?;
            }
        }
        for input in [LayerInput::Text, LayerInput::Time].into_iter().filter(|input| open.contains(input)) {
            let task = Task::begin(progress, "layers", "layers", self.count(&layers, std::slice::from_ref(&input)));
            self.treat_input(&name, (&layers, false), &input, Gathered::of(shared.hessian(&input)), finished, &task)?;
        }
        self.treat_alone(&name, outline.layers(), finished, progress)?;
        finished.flush()?;
        self.load(lanes, spec)?;
        for lane in lanes.iter_mut() {
            lane.take_over(finished, &|_| true)?;
        }
        lane::outputs(lanes, Way::Whole, &name, go_on, progress)
    }

    /// The same unit by unit, and in each input by input, of the part that the lanes have loaded: what is gathered has gone through all
    /// layers before as they will be stored.
    fn sublayers(
        &self,
        name: &str,
        lanes: &mut [Lane],
        shared: &Gatherer,
        go_on: bool,
        finished: &mut Workspace,
        progress: &dyn Progress,
    ) -> Result<()> {
        self.treat_alone(name, lanes[0].layers(), finished, progress)?;
        for unit in 0..lanes[0].units() {
            let mut inputs: Vec<LayerInput> = Vec::new();
            for layer in lanes[0].layers().iter().filter(|layer| lanes[0].unit_has(unit, layer)) {
                if !inputs.contains(layer.input()) {
                    inputs.push(layer.input().clone());
                }
            }
            // What text and time go through does not depend on other layers.
            inputs.sort_by_key(|input| matches!(input, LayerInput::Features(_)));
            for (at, input) in inputs.iter().enumerate() {
                let last = at + 1 == inputs.len();
                let of_input = |layer: &Layer| layer.input() == input && self.needs_hessian(layer);
                let names: Vec<String> = lanes[0]
                    .layers()
                    .iter()
                    .filter(|layer| lanes[0].unit_has(unit, layer) && of_input(layer))
                    .map(|layer| layer.name().to_owned())
                    .collect();
                if names.iter().any(|name| !finished.has(name)) {
                    let own;
                    let gathered = match input {
                        LayerInput::Features(_) => {
                            let inputs = std::slice::from_ref(input);
                            let pass = Pass { way: Way::Unit(unit), inputs, hold: self.guards(), last };
                            own = lane::gather(lanes, pass, name, progress)?;
                            Gathered::all(&own, input)
                        }
                        LayerInput::Text | LayerInput::Time => Gathered::of(shared.hessian(input)),
                    };
                    let task = Task::begin(progress, "layers", "layers", names.len());
                    self.treat_input(name, (&named(&lanes[0], &names), true), input, gathered, finished, &task)?;
                }
                finished.flush()?;
                for lane in lanes.iter_mut() {
                    lane.take_over(finished, &of_input)?;
                }
            }
            for lane in lanes.iter_mut() {
                lane.take_over(finished, &|layer| !self.needs_hessian(layer))?;
            }
            let more = go_on || unit + 1 < lanes[0].units();
            lane::outputs(lanes, Way::Unit(unit), name, more, progress)?;
        }
        Ok(())
    }

    /// Whether a layer is treated by what its inputs look like.
    fn needs_hessian(&self, layer: &Layer) -> bool {
        self.recipes.get(layer.name()).is_some_and(LayerRecipe::needs_hessian)
    }

    /// Loads a stage on every lane.
    fn load(&self, lanes: &mut [Lane], spec: &StageSpec) -> Result<()> {
        lanes.iter_mut().try_for_each(|lane| lane.load(spec, self.source))
    }

    /// Whether samples are held out, to see that what the joint solver finds is better on them too.
    fn guards(&self) -> bool {
        self.recipes.values().any(|recipe| recipe.joint.is_some())
    }

    /// How many layers of a stage have one of these inputs and a recipe.
    fn count(&self, layers: &[&Layer], inputs: &[LayerInput]) -> usize {
        let wanted = |layer: &&&Layer| inputs.contains(layer.input()) && self.recipes.contains_key(layer.name());
        layers.iter().filter(wanted).count()
    }

    /// A layer's dense weight: where the stage is not loaded it is read, as for [`Blueprint`]s.
    fn weight_of(&self, layer: &Layer, loaded: bool) -> Result<Tensor> {
        match loaded {
            true => Ok(layer.weight().shallow_clone()),
            false => self.source.tensor(&format!("{}.weight", layer.name()), &layer.weight().size()),
        }
    }

    /// Treats the layers of one input, whose Hessian is factored once for all of them.
    fn treat_input(
        &self,
        part: &str,
        (of, loaded): (&[&Layer], bool),
        input: &LayerInput,
        gathered: Gathered<'_>,
        finished: &mut Workspace,
        task: &Task,
    ) -> Result<()> {
        let Gathered { hessian, corrections, held_out } = gathered;
        let layers: Vec<_> = of
            .iter()
            .filter(|layer| layer.input() == input && !finished.has(layer.name()))
            .filter_map(|layer| Some((layer, self.recipes.get(layer.name())?)))
            .collect();
        let mut made: Option<(f64, Vec<Factor>)> = None;
        let mut made_joint: Option<JointFactors> = None;
        for (layer, recipe) in &layers {
            task.go_on()?;
            task.advance(layer.name());
            let calibrated = match hessian.filter(|_| recipe.needs_hessian()) {
                None => None,
                Some(hessian) => {
                    // A layer alone makes its factor itself and drops it before the errors are computed.
                    if let Some(options) = recipe.joint_options().filter(|_| layers.len() > 1) {
                        let (dampening, order) = (options.dampening(), options.order());
                        if made_joint.as_ref().is_none_or(|made| !made.fit(dampening, order)) {
                            // The old ones go first: there may not be memory for both.
                            drop(made_joint.take());
                            let factors = JointFactors::new(hessian, dampening, order).map_err(Error::layer(layer.name()))?;
                            made_joint = Some(factors);
                        }
                    } else if let Some(options) = recipe.prune.filter(|_| layers.len() > 1)
                        && made.as_ref().is_none_or(|(dampening, _)| *dampening != options.dampening)
                    {
                        let factors = Factor::all(hessian, options.dampening).map_err(Error::layer(layer.name()))?;
                        made = Some((options.dampening, factors));
                    }
                    let factors = made.as_ref().map(|(dampening, factors)| (*dampening, factors.as_slice()));
                    let correction = corrections.and_then(|corrections| corrections.get(layer.name()));
                    Some(Evidence { hessian, pruned: None, factors, joint: made_joint.as_ref(), correction, held_out })
                }
            };
            finish(part, layer.name(), &self.weight_of(layer, loaded)?, recipe, calibrated, finished, task)?;
        }
        Ok(())
    }
}

/// The layers of these names.
fn named<'a>(lane: &'a Lane, names: &[String]) -> Vec<&'a Layer> {
    lane.layers().iter().filter(|layer| names.iter().any(|name| name == layer.name())).collect()
}

/// What is known of an input.
#[derive(Clone, Copy)]
struct Gathered<'a> {
    hessian: Option<&'a Hessian>,
    /// By how much the outputs of its layers are off, by name.
    corrections: Option<&'a BTreeMap<String, Correction>>,
    /// Vectors that are not in the Hessian.
    held_out: Option<&'a Tensor>,
}

impl<'a> Gathered<'a> {
    fn of(hessian: Option<&'a Hessian>) -> Self {
        Gathered { hessian, corrections: None, held_out: None }
    }

    /// All that a gatherer has on an input.
    fn all(gatherer: &'a Gatherer, input: &LayerInput) -> Self {
        let (hessian, held_out) = (gatherer.hessian(input), gatherer.held_out(input));
        Gathered { hessian, corrections: Some(gatherer.corrections()), held_out }
    }
}

/// Treats a layer, says what it cost, and hands it to the workspace.
fn finish(
    part: &str,
    name: &str,
    weight: &Tensor,
    recipe: &LayerRecipe,
    calibrated: Option<Evidence<'_>>,
    finished: &mut Workspace,
    task: &Task,
) -> Result<()> {
    /// Weights of more elements leave blocks behind that nothing else fits into.
    const LARGE: usize = 4 << 20;
    let treated = treat(name, weight, recipe, calibrated)?;
    if weight.numel() > LARGE {
        allocator::give_back();
    }
    let mut notes = Vec::new();
    for note in &treated.notes {
        tracing::warn!("{name}: {note}");
        notes.push(format!("{name}: {note}"));
    }
    let report = LayerReport {
        name: name.to_owned(),
        stage: part.to_owned(),
        shape: weight.size(),
        sparsity: treated.stored.as_ref().map_or(0.0, CompressedWeight::sparsity),
        bits_per_weight: treated.stored.as_ref().map_or(16.0, CompressedWeight::bits_per_weight),
        bytes: treated.stored.as_ref().map_or(2 * weight.numel() as u64, CompressedWeight::stored_bytes),
        vectors: calibrated.map(|calibrated| calibrated.hessian.vectors()),
        errors: treated.errors,
    };
    task.note(&describe(&report));
    finished.push(report, notes, treated.stored)
}

/// A line for people who watch.
fn describe(layer: &LayerReport) -> String {
    let LayerErrors { weight, pruned_output, output } = layer.errors;
    let errors = match (pruned_output, output) {
        (Some(pruned), Some(output)) => {
            format!("output error {} pruned, {} stored", number::percent(pruned), number::percent(output))
        }
        _ => format!("weight error {}", number::percent(weight)),
    };
    format!("{}: {:.2} bits a weight, {errors}", layer.name, layer.bits_per_weight)
}

/// Where the samples of [`Job`] are placed.
fn placement(device: Device, kind: Kind) -> Placement {
    Placement { device, kind }
}

/// The folder of carries in a workspace.
fn carries_folder(workspace: &Path, lane: &str) -> std::path::PathBuf {
    workspace.join(format!("carries-{lane}"))
}
