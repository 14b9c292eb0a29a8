//! A whole run: calibration, compression, container.

use std::collections::BTreeMap;

use sdxl_model::Layer;
use sdxl_model::checkpoint::TensorSource;
use sdxl_pipeline::{DenseUnet, PipelineFolder};
use squeeze_base::error::{Error, Result};
use squeeze_base::input::SourceFile;
use squeeze_base::number;
use squeeze_base::progress::{Progress, Task};
use squeeze_container::{ContainerInfo, Network};

use super::allocate::{self, Forecast, Measurement, PriceFile, Prices, Settings, Shapes};
use super::beside::{Unseen, beside};
use super::captions;
use super::container::{Finished, write_container};
use super::gather::Gatherer;
use super::identity::{Inputs, sources_of};
use super::job::{Calibration, Job, Machine, Model};
use super::kept::Kept;
use super::output_metrics::output_metrics;
use super::prepare::Prepared;
use super::report::{JobReport, LayerReport};
use super::samples;
use super::solve::Compressor;
use super::statistics::Statistics;
use super::team::Team;
use super::tuning::tune_layers;
use super::walk::{Walk, execute};
use super::workspace::{Claim, Workspace, workspace_folder};
use crate::calibration::{self, Samples, calibrate};
use crate::config::{CalibrationSection, RunConfig, TimestepWeighting};
use crate::plan::{Memory, Plan};
use crate::recipe::{LayerRecipe, LayerRecipes, Recipe, Sequencing};
use crate::tune::Trained;

/// Compresses the layers of `job` that `store` does not have yet, and adds them to it.
///
/// Samples are needed if a recipe needs Hessians. Otherwise no forward is run, and one weight at a
/// time is in memory. `captions` are Hessians of text and time, added to those of the samples.
///
/// # Errors
/// If a layer cannot be compressed, activations become NaN or infinite, or there are no samples
/// where some are needed; [`Error::Stopped`](squeeze_base::Error::Stopped) when progress says so,
/// after the layer under way. In
/// every case finished layers are kept.
pub fn compress(job: &Job<'_>, captions: Gatherer, store: &mut Workspace, progress: &dyn Progress) -> Result<Statistics> {
    if job.layers.values().any(LayerRecipe::needs_hessian) {
        job.calibration.check()?;
    }
    let folder = store.folder().to_owned();
    let metrics = tracing::debug_span!("output metrics").in_scope(|| output_metrics(job, store, &folder, progress))?;
    let mut walk = Walk::new(job, captions, &folder, progress)?;
    let team = Team { devices: job.machine.devices.as_slice(), spare_bytes: job.plan.batch_bytes };
    let mut compressor = Compressor { layers: job.layers, metrics: &metrics, team, store, progress };
    let task = Task::begin(progress, "compressing", "parts", job.model.chain.stages().len() + 2);
    let ended = execute(&job.plan.schedule, &mut walk, &mut compressor, &task);
    // Layers that were finished before an error are kept.
    let flushed = compressor.store.flush();
    ended.and(flushed)?;
    Ok(walk.into_statistics())
}

/// Compresses the pipeline's UNet by the config of `prepared` and writes the container to its path.
///
/// `samples` are used if they are given, so that several runs can share them; otherwise they are
/// drawn if a layer needs them. Finished layers are kept beside the container's path until the
/// container is written; with [`RunOptions::resume`](crate::recipe::RunOptions::resume) a run goes
/// on with them.
///
/// # Errors
/// If prompts, captions or samples cannot be read, the model has values that a container cannot
/// hold, the memory is too little for the samples, calibration fails, a layer cannot be compressed,
/// or the container cannot be written; [`Error::Changed`](squeeze_base::Error::Changed) if a file
/// is written to while it is read; [`Error::Stopped`](squeeze_base::Error::Stopped).
pub fn run(prepared: &Prepared, samples: Option<&Samples>, progress: &dyn Progress) -> Result<JobReport> {
    let numerics = crate::init();
    let Prepared { unet, config, options, path, weights, recipe, .. } = prepared;
    let mut inputs = Inputs::read(*unet, config, samples, recipe.needs_samples())?;
    let is_drawn = samples.is_none() && inputs.samples.is_none() && recipe.needs_samples();
    let hash = |progress: &dyn Progress| tracing::debug_span!("hash").in_scope(|| sources_of(*unet, weights, progress));
    let (claim, (sources, first)) = Claim::of(&workspace_folder(path))?.during(|claim| {
        // Which run an unfinished one is, is known once its model is hashed.
        if !is_drawn || (options.resume && claim.has_run()) {
            return Ok((hash(progress)?, None));
        }
        let folder = prepared.folder()?;
        let draw = |progress: &dyn Progress| {
            let section = inputs.section(&config.calibration);
            tracing::debug_span!("calibration").in_scope(|| calibrate(folder, weights, &section, options, progress))
        };
        let unseen = Unseen(progress);
        let drawn = beside(|| hash(&unseen), draw, progress);
        let (sources, samples) = drawn.map_err(|error| error.during("the calibration samples"))?;
        Ok((sources, Some(samples)))
    })?;
    let identity = inputs.identity(config, &sources, options);
    let mut workspace = claim.open(&identity, options.resume)?;
    let drawn = match samples {
        Some(_) => None,
        None => own_samples(prepared, &mut inputs, first, &mut workspace, progress)
            .map_err(|error| error.during("the calibration samples"))?,
    };
    let none = Samples::default();
    let mut run = Run::new(prepared, &inputs, samples.or(drawn.as_ref()).unwrap_or(&none), progress)?;
    run.notes.extend(numerics.note());
    run.notes.extend(few_prompts(config, recipe, inputs.prompts.len()));
    run.notes.extend(unknown_prediction(*unet));
    run.notes.iter().for_each(|note| tracing::warn!("{note}"));
    let source = weights.narrow_source(options.placement());
    let (config, recipe) = run.settle_budget(&source, &sources, &mut workspace)?;
    let plan = run.plan(&recipe.layers, recipe.sequencing)?;
    tracing::info!("planned: {} of memory at most, {} passes", number::size(plan.peak_bytes), plan.passes());
    let captions = match plan.calls {
        Some(_) => run.captions(&recipe.layers)?,
        None => Gatherer::default(),
    };
    let statistics = compress(&run.job(&source, &recipe.layers, &plan), captions, &mut workspace, progress)?;
    run.notes.extend(statistics.overflows);
    let tuned = run.tune(&config, &source, &mut workspace)?;

    let info = ContainerInfo {
        network: Network::Unet,
        config: unet.config().clone(),
        recipe: inputs.recipe(&config),
        sources,
        prediction_type: unet.prediction_type().map(str::to_owned),
    };
    let tensors = unet.chain().tensors()?;
    let finished = Finished { info, tensors, weights, layers: &workspace, tuned: tuned.as_ref() };
    let (written, sums) = tracing::debug_span!("container").in_scope(|| write_container(path, finished, progress))?;
    let is_calibrated = drawn.is_some() || plan.calls.is_some();
    let layers = in_execution_order(&recipe, &workspace);
    let report = JobReport {
        bytes: written.bytes,
        payload_bytes: written.payload_bytes,
        samples: if is_calibrated { run.samples.calls.len() } else { 0 },
        sparsity: sums.sparsity(),
        bits_per_weight: sums.bits_per_weight(),
        layers: layers.iter().map(|(report, _)| (*report).clone()).collect(),
        notes: run.notes_of(&recipe, &workspace, &layers),
        plan,
        tuning: tuned.map(|tuned| tuned.log),
        config,
    };
    workspace.remove()?;
    Ok(report)
}

/// What the settings of the budget of `prepared` cost on `samples`: read from the file of its
/// prices, or measured and written there. `sources` are the files of the model, `workspace` has the
/// folder for carries and takes warnings.
///
/// # Errors
/// As [`run`]; [`Error::Internal`] if there is no budget.
pub(super) fn forecast(
    prepared: &Prepared<'_>,
    samples: &Samples,
    sources: &[SourceFile],
    workspace: &mut Workspace,
    progress: &dyn Progress,
) -> Result<Forecast> {
    let Prepared { unet, config, options, weights, recipe, .. } = prepared;
    let budget = config.budget.as_ref().ok_or_else(|| Error::internal("a forecast was asked for without a budget"))?;
    let inputs = Inputs::read(*unet, config, Some(samples), recipe.needs_samples())?;
    let run = Run::new(prepared, &inputs, samples, progress)?;
    let plan = run.plan(&recipe.layers, recipe.sequencing)?;
    let shapes = allocate::shapes(unet.chain())?;
    let settings = allocate::settings(recipe, &shapes, budget)?;
    let source = weights.narrow_source(options.placement());
    let prices = run.prices(&settings, &shapes, budget.probes, (&source, sources), workspace)?;
    Ok(Forecast::new(&prices, &shapes, recipe, &plan))
}

/// A run whose samples are there.
struct Run<'a> {
    prepared: &'a Prepared<'a>,
    inputs: &'a Inputs,
    samples: &'a Samples,
    /// The weight of each sample; empty if all weigh the same.
    sample_weights: Vec<f64>,
    timesteps: Vec<f64>,
    /// The calibration section, with its prompts.
    section: CalibrationSection,
    memory: Memory,
    notes: Vec<String>,
    progress: &'a dyn Progress,
}

impl<'a> Run<'a> {
    fn new(prepared: &'a Prepared<'a>, inputs: &'a Inputs, samples: &'a Samples, progress: &'a dyn Progress) -> Result<Self> {
        let Prepared { unet, config, options, .. } = prepared;
        let (sample_weights, timesteps) = match unet {
            DenseUnet::OfPipeline(folder) => of_samples(folder, config, samples)?,
            DenseUnet::Alone(_) => (Vec::new(), Vec::new()),
        };
        Ok(Run {
            prepared,
            inputs,
            samples,
            sample_weights,
            timesteps,
            section: inputs.section(&config.calibration),
            // Samples take memory too, and there may be fewer than were planned with.
            memory: Memory::new(options.memory_budget()?, options.kind, options.placement().device),
            notes: Vec::new(),
            progress,
        })
    }

    fn plan(&self, layers: &LayerRecipes, sequencing: Sequencing) -> Result<Plan> {
        self.prepared.plan_for(layers, sequencing, self.samples.shape(), self.memory)
    }

    fn job<'b>(&'b self, source: &'b (dyn TensorSource + Sync), layers: &'b LayerRecipes, plan: &'b Plan) -> Job<'b> {
        let Prepared { unet, options, .. } = self.prepared;
        Job {
            model: Model { chain: unet.chain(), source },
            layers,
            plan,
            calibration: Calibration { samples: self.samples, weights: &self.sample_weights, timesteps: &self.timesteps },
            machine: Machine { devices: &options.devices, kind: options.kind },
        }
    }

    /// The Hessians of text and time from the captions.
    fn captions(&self, layers: &LayerRecipes) -> Result<Gatherer> {
        let _span = tracing::debug_span!("captions").entered();
        let Prepared { options, weights, .. } = self.prepared;
        let folder = self.prepared.folder()?;
        let needs_hessian = |layer: &Layer| layers.get(layer.name()).is_some_and(LayerRecipe::needs_hessian);
        let captions = captions::Captions { lines: &self.inputs.captions, section: &self.section };
        let gathered = captions::gather(folder, weights, captions, &needs_hessian, options, self.progress)
            .map_err(|error| error.during("the captions"))?;
        if !self.inputs.captions.is_empty() {
            self.inputs.check_prompt_files(folder)?;
        }
        Ok(gathered)
    }

    /// The config and its recipe. If the config has a budget, settings for each layer take its
    /// place; they are kept in the workspace.
    fn settle_budget(
        &mut self,
        source: &(dyn TensorSource + Sync),
        sources: &[SourceFile],
        workspace: &mut Workspace,
    ) -> Result<(RunConfig, Recipe)> {
        const ALLOCATED: &str = "recipe.yaml";
        let Prepared { unet, config, recipe, .. } = self.prepared;
        let Some(budget) = &config.budget else { return Ok((config.clone(), recipe.clone())) };
        let allocated = if let Some(kept) = workspace.kept(ALLOCATED) {
            RunConfig::parse(&workspace.folder().join(ALLOCATED), &kept)?
        } else {
            let plan = self.plan(&recipe.layers, recipe.sequencing)?;
            let shapes = allocate::shapes(unet.chain())?;
            let settings = allocate::settings(recipe, &shapes, budget)?;
            let prices = self.prices(&settings, &shapes, budget.probes, (source, sources), workspace)?;
            let allocation = allocate::allocate(&prices, &shapes, config, recipe, &plan, budget)?;
            let size = number::size(allocation.payload_bytes);
            tracing::info!("allocated: {size}");
            self.notes.push(format!("settings were found for each layer, together {size}"));
            workspace.keep(ALLOCATED, allocation.config.to_yaml().as_bytes())?;
            allocation.config
        };
        let recipe = Recipe::new(&allocated, unet.chain())?;
        Ok((allocated, recipe))
    }

    /// What each of `settings` costs: read from the file of prices if it has them, else measured
    /// and kept there.
    fn prices(
        &self,
        settings: &Settings,
        shapes: &Shapes,
        probes: usize,
        (source, sources): (&(dyn TensorSource + Sync), &[SourceFile]),
        workspace: &mut Workspace,
    ) -> Result<Prices> {
        let Prepared { config, options, recipe, prices, .. } = self.prepared;
        let file = match prices {
            Some(path) => Some(PriceFile::new(path, self.inputs.identity_of_prices(config, sources, options)?)),
            None => None,
        };
        if let Some(file) = &file {
            let shown = file.path().display();
            match file.read(settings, shapes) {
                Kept::Whole(prices) => {
                    tracing::info!("error curves and sensitivities are those of {shown}");
                    return Ok(prices);
                }
                Kept::Absent => {}
                Kept::Damaged => {
                    workspace.warn(format!("{shown} is damaged or of another run: error curves are measured again"));
                }
            }
        }
        let layers = allocate::measuring(&recipe.layers);
        let mut measuring = self.plan(&layers, Sequencing::Stage)?;
        // Error curves are compared with each other and not validated.
        measuring.schedule.holds_out = false;
        let job = self.job(source, &layers, &measuring);
        let captions = self.captions(&layers)?;
        let measurement = Measurement { job, captions, folder: workspace.folder(), progress: self.progress };
        let prices = allocate::measure(measurement, settings.clone(), probes)?;
        if let Some(file) = file {
            file.write(&prices, settings)?;
        }
        Ok(prices)
    }

    /// Tunes the finished layers, if `config` asks for it.
    fn tune(
        &mut self,
        config: &RunConfig,
        source: &(dyn TensorSource + Sync),
        workspace: &mut Workspace,
    ) -> Result<Option<Trained>> {
        let Some(section) = &config.tune else { return Ok(None) };
        /// 48 prompts make the bundled model worse.
        const MANY: usize = 100;
        let _span = tracing::debug_span!("tuning").entered();
        let prompts = self.inputs.tuning_prompts.len();
        if prompts < MANY {
            let few = format!("{prompts} prompts are few for `tune`, which overfits them; some hundreds are better");
            tracing::warn!("{few}");
            self.notes.push(few);
        }
        let tuned = tune_layers(self.prepared, section, self.inputs, source, workspace, self.progress)
            .map_err(|error| error.during("the tuning"))?;
        tracing::info!("{}", tuned.log);
        self.notes.push(tuned.log.to_string());
        Ok(Some(tuned))
    }

    /// Everything that the report has to say, in the order in which it was found.
    fn notes_of(&self, recipe: &Recipe, workspace: &Workspace, layers: &[(&LayerReport, &[String])]) -> Vec<String> {
        let findings = recipe.resolution.findings.iter().map(ToString::to_string);
        findings
            .chain(self.samples.notes.iter().cloned())
            .chain(self.notes.iter().cloned())
            .chain(workspace.warnings().iter().cloned())
            .chain(layers.iter().flat_map(|(_, notes)| notes.iter().cloned()))
            .collect()
    }
}

/// The weight of each of `samples` (none if all weigh the same), and the training timesteps.
fn of_samples(folder: &PipelineFolder, config: &RunConfig, samples: &Samples) -> Result<(Vec<f64>, Vec<f64>)> {
    let scheduler = calibration::scheduler(folder, &config.calibration)?;
    let weights = match config.calibration.timestep_weighting {
        TimestepWeighting::Uniform => Vec::new(),
        by @ (TimestepWeighting::Early | TimestepWeighting::Log) => calibration::weights(samples, &scheduler, by)?,
    };
    Ok((weights, scheduler.training_timesteps()?))
}

/// A remark if nothing says what the UNet predicts.
fn unknown_prediction(unet: DenseUnet<'_>) -> Option<String> {
    let remark = || {
        format!(
            "{} is a UNet alone, without the sampler's config that says what the UNet predicts: the container does not record it",
            unet.path().display()
        )
    };
    unet.prediction_type().is_none().then(remark)
}

/// The samples of a run that is given none: read from the config's file, `drawn` already, or drawn
/// if a layer needs them.
pub(super) fn own_samples(
    prepared: &Prepared<'_>,
    inputs: &mut Inputs,
    drawn: Option<Samples>,
    workspace: &mut Workspace,
    progress: &dyn Progress,
) -> Result<Option<Samples>> {
    let Prepared { config, options, weights, recipe, .. } = prepared;
    match inputs.samples.take() {
        Some(read) => Ok(Some(read)),
        None if recipe.needs_samples() => {
            let folder = prepared.folder()?;
            let samples = match drawn {
                Some(drawn) => {
                    samples::keep(&drawn, workspace)?;
                    drawn
                }
                None => {
                    let _span = tracing::debug_span!("calibration").entered();
                    let section = inputs.section(&config.calibration);
                    samples::kept_samples(folder, weights, &section, options, workspace, progress)?
                }
            };
            inputs.check_prompt_files(folder)?;
            Ok(Some(samples))
        }
        None => Ok(None),
    }
}

/// The reports and notes of all compressed layers.
fn in_execution_order<'a>(recipe: &Recipe, workspace: &'a Workspace) -> Vec<(&'a LayerReport, &'a [String])> {
    let mut reports: BTreeMap<&str, (&LayerReport, &[String])> =
        workspace.reports().map(|(report, notes)| (report.name.as_str(), (report, notes))).collect();
    recipe.resolution.layers.iter().filter_map(|layer| reports.remove(layer.name.as_str())).collect()
}

/// A warning if layers are fitted to the dense outputs of a few pictures.
fn few_prompts(config: &RunConfig, recipe: &Recipe, prompts: usize) -> Option<String> {
    /// With three prompts the bundled model gets worse by it; with 48 much better.
    const ENOUGH: usize = 16;
    if !recipe.sequencing.has_dense_target() || config.calibration.samples.is_some() {
        return None;
    }
    let warning = || {
        format!(
            "{prompts} prompts are few for `target: dense`, which fits them too well; more prompts or `target: current` are better"
        )
    };
    (1..ENOUGH).contains(&prompts).then(warning)
}
