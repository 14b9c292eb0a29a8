//! A whole run: calibration, compression, container.

use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::{Value, json};
use tch::{Device, Kind};

use super::identity::{Inputs, sources_of};
use super::{
    Gatherer, Job, LayerRecipe, LayerRecipes, LayerReport, Prepared, Recipe, RunOptions, Sequencing, Workspace, allocate,
    captions, compress, kept,
};
use crate::calibration::{self, Samples, calibrate};
use crate::checkpoint::{SafetensorsFile, SourceFile, TensorSource, Weights};
use crate::config::{CalibrationSection, RunConfig, TimestepWeighting};
use crate::container::{ContainerInfo, ContainerWriter, Written};
use crate::device::Placement;
use crate::error::{Error, Result};
use crate::model::Layer;
use crate::number;
use crate::pipeline::PipelineFolder;
use crate::plan::{Memory, Plan};
use crate::progress::{Progress, Task};

/// What a run came to; written beside the container as JSON.
#[derive(Debug, Serialize)]
pub struct JobReport {
    /// Bytes of the container.
    pub bytes: u64,
    /// Bytes of the tensors in it.
    pub payload_bytes: u64,
    /// Calibration samples that were used; 0 if nothing was pruned.
    pub samples: usize,
    /// Pruned share of all compressed weights.
    pub sparsity: f64,
    /// Stored bits a weight, over all compressed weights.
    pub bits_per_weight: f64,
    /// What was planned.
    pub plan: Plan,
    /// Every treated layer, in execution order.
    pub layers: Vec<LayerReport>,
    /// Everything that had to be said on the way.
    pub notes: Vec<String>,
    /// The config that was run: where one with a budget was given, that with the settings found for it.
    #[serde(skip)]
    pub config: RunConfig,
}

/// The folder in which a run for the container `path` keeps what is finished, until the container is there.
pub fn workspace_folder(path: &Path) -> PathBuf {
    path.with_extension("work")
}

/// Compresses the pipeline's UNet as the config of `prepared` says and writes the container to its path.
///
/// `samples` are used if they are given (several runs can share them); otherwise they are made if a layer needs them. What is finished is
/// kept beside the container's path until the container is there; with [`RunOptions::resume`] a run goes on with it.
///
/// # Errors
/// If prompts, captions or samples cannot be read, the model has values that a container cannot hold, the memory does not do for the samples
/// that there are, calibration fails, a layer cannot be treated, or the container cannot be written; [`Error::Changed`] if a file is written
/// to while it is read; [`Error::Stopped`].
pub fn run(prepared: &Prepared, samples: Option<&Samples>, progress: &dyn Progress) -> Result<JobReport> {
    let numerics = crate::init();
    let Prepared { folder, config, options, path, weights, recipe, .. } = prepared;
    let (mut recipe, mut config) = (recipe.clone(), config.clone());
    let needs_samples = recipe.layers.values().any(LayerRecipe::needs_hessian);
    let mut inputs = Inputs::read(folder, &config, samples, needs_samples)?;
    let sources = sources_of(folder, weights, progress)?;
    let identity = inputs.identity(&config, &sources, options);
    let mut workspace = Workspace::open(&workspace_folder(path), &identity, options.resume)?;
    let section = inputs.section(&config.calibration);

    let none = Samples::default();
    let made = match (samples, inputs.samples.take()) {
        (None, Some(read)) => Some(read),
        (None, None) if needs_samples => {
            let made = kept_samples(folder, weights, &section, options, &mut workspace, progress)?;
            inputs.check_prompt_files(folder)?;
            Some(made)
        }
        _ => None,
    };
    let samples = samples.or(made.as_ref()).unwrap_or(&none);
    // Samples take memory too, and there may be fewer than were planned with.
    let memory = Memory::new(options.memory_budget()?, options.kind, options.placement().device);
    let plan = |recipes: &LayerRecipes, sequencing| prepared.plan_for(recipes, sequencing, samples.shape(), memory);
    let calibration_weights = match config.calibration.timestep_weighting {
        TimestepWeighting::Uniform => Vec::new(),
        by => calibration::weights(samples, folder, by)?,
    };
    let captions = |recipes: &LayerRecipes| -> Result<Gatherer> {
        let hungry = |layer: &Layer| recipes.get(layer.name()).is_some_and(LayerRecipe::needs_hessian);
        let gathered = captions::gather(folder, weights, &section, &inputs.captions, &hungry, options, progress)?;
        if !inputs.captions.is_empty() {
            inputs.check_prompt_files(folder)?;
        }
        Ok(gathered)
    };
    let source = weights.narrow_source(options.placement());
    let timesteps = folder.scheduler.train_timesteps()?;
    let few = few_prompts(&config, &recipe, inputs.prompts.len());
    let mut said: Vec<String> = numerics.note().into_iter().chain(few).collect();
    said.iter().for_each(|said| tracing::warn!("{said}"));
    if let Some(budget) = &config.budget {
        const FOUND: &str = "recipe.yaml";
        let allocated = if let Some(kept) = workspace.kept(FOUND) {
            RunConfig::parse(&workspace.folder().join(FOUND), &kept)?
        } else {
            let recipes = allocate::measuring(&recipe.layers);
            let (measuring, as_it_is) = (plan(&recipes, Sequencing::Stage)?, plan(&recipe.layers, recipe.sequencing)?);
            let job = Job {
                chain: &folder.unet,
                source: &source,
                recipes: &recipes,
                plan: &measuring,
                sequencing: Sequencing::Stage,
                weights: &calibration_weights,
                timesteps,
                kind: options.kind,
                devices: options.devices.as_slice(),
            };
            let captions = captions(&recipes)?;
            let found =
                allocate::allocate(&job, &config, &recipe, &as_it_is, budget, samples, captions, workspace.folder(), progress)?;
            tracing::info!("allocated: {}", number::size(found.payload_bytes));
            said.push(format!("settings were found for each layer, together {}", number::size(found.payload_bytes)));
            workspace.keep(FOUND, found.config.to_yaml().as_bytes())?;
            found.config
        };
        recipe = Recipe::new(&allocated, &folder.unet)?;
        config = allocated;
    }
    let plan = plan(&recipe.layers, recipe.sequencing)?;
    tracing::info!(
        "planned: {} of memory at most, {} passes",
        number::size(plan.peak_bytes),
        plan.stages.iter().map(|stage| stage.passes).sum::<usize>()
    );
    let captions = match plan.calls {
        Some(_) => captions(&recipe.layers)?,
        None => Gatherer::default(),
    };
    let job = Job {
        chain: &folder.unet,
        source: &source,
        recipes: &recipe.layers,
        plan: &plan,
        sequencing: recipe.sequencing,
        weights: &calibration_weights,
        timesteps,
        kind: options.kind,
        devices: options.devices.as_slice(),
    };
    compress(&job, samples, captions, &mut workspace, progress)?;

    let settings = serde_yaml::from_str::<Value>(&config.to_yaml()).map_err(|why| Error::Failed(why.to_string()))?;
    let (written, sums) = write_container(path, folder, weights, &workspace, ContainerParts { settings, sources }, progress)?;
    let mut reports: std::collections::BTreeMap<&str, (&LayerReport, &[String])> =
        workspace.reports().map(|(report, notes)| (report.name.as_str(), (report, notes))).collect();
    let in_order: Vec<_> = recipe.resolution.layers.iter().filter_map(|layer| reports.remove(layer.name.as_str())).collect();
    let found = recipe.resolution.findings.iter().map(ToString::to_string);
    let of_layers = in_order.iter().flat_map(|(_, notes)| notes.iter().cloned());
    let share = |part: u64| part as f64 / sums.elements.max(1) as f64;
    let report = JobReport {
        bytes: written.bytes,
        payload_bytes: written.payload_bytes,
        samples: if made.is_some() || plan.calls.is_some() { samples.calls.len() } else { 0 },
        sparsity: 1.0 - share(sums.kept),
        bits_per_weight: 8.0 * share(sums.bytes),
        layers: in_order.iter().map(|(report, _)| (*report).clone()).collect(),
        notes: found
            .chain(samples.notes.iter().cloned())
            .chain(said)
            .chain(workspace.said().iter().cloned())
            .chain(of_layers)
            .collect(),
        plan,
        config,
    };
    workspace.remove()?;
    Ok(report)
}

/// What has to be said where layers are fitted to the dense outputs of a few pictures.
fn few_prompts(config: &RunConfig, recipe: &Recipe, prompts: usize) -> Option<String> {
    /// With three, the bundled model gets worse by it; with 48 much better.
    const ENOUGH: usize = 16;
    if !recipe.sequencing.has_dense_target() || config.calibration.samples.is_some() {
        return None;
    }
    let few = || {
        format!(
            "{prompts} prompts are few for `target: dense`, which fits them too well; more prompts or `target: current` are better"
        )
    };
    (1..ENOUGH).contains(&prompts).then(few)
}

/// The samples that a run keeps in its workspace, made if they are not there or not what was kept.
fn kept_samples(
    folder: &PipelineFolder,
    weights: &Weights,
    section: &CalibrationSection,
    options: &RunOptions,
    workspace: &mut Workspace,
    progress: &dyn Progress,
) -> Result<Samples> {
    const SAMPLES: &str = "samples.safetensors";
    const NOTES: &str = "samples.json";
    if let Some(notes) = workspace.kept(NOTES)
        && kept::has_seal(workspace.folder(), SAMPLES)
    {
        let path = workspace.folder().join(SAMPLES);
        let read = || -> Result<Samples> {
            let file = SafetensorsFile::open(&path)?;
            if !kept::fits(workspace.folder(), workspace.run(), SAMPLES, &file.sha256()?) {
                return Err(Error::bad_file(&path, "is damaged"));
            }
            // The count is what there is, so reading has nothing to say; recording may have had.
            let mut samples = Samples::from_file(&file, folder.unet.config(), usize::MAX)?;
            samples.notes = serde_json::from_slice(&notes).map_err(|source| Error::Json { path: NOTES.into(), source })?;
            Ok(samples)
        };
        match read() {
            Ok(samples) => return Ok(samples),
            Err(why) => workspace.say(format!("{why}: the samples are made again")),
        }
    }
    let samples = calibrate(folder, weights, section, options, progress)?;
    let notes = serde_json::to_vec(&samples.notes).map_err(|why| Error::Failed(why.to_string()))?;
    workspace.keep(NOTES, &notes)?;
    workspace.keep(SAMPLES, &samples.to_bytes()?)?;
    Ok(samples)
}

/// What a container says of itself besides its weights.
struct ContainerParts {
    settings: Value,
    sources: Vec<SourceFile>,
}

/// Sums over the compressed weights.
#[derive(Debug, Default)]
struct Sums {
    elements: u64,
    kept: u64,
    bytes: u64,
}

/// Writes the finished weights, and everything else of the UNet in fp16, to a container.
fn write_container(
    path: &Path,
    folder: &PipelineFolder,
    weights: &Weights,
    finished: &Workspace,
    parts: ContainerParts,
    progress: &dyn Progress,
) -> Result<(Written, Sums)> {
    let info = ContainerInfo { unet_config: folder.unet_config().clone(), recipe: parts.settings, sources: parts.sources };
    let mut writer = ContainerWriter::create(path, info)?;
    let halves = weights.source(Placement { device: Device::Cpu, kind: Kind::Half });
    let reports: std::collections::BTreeMap<&str, &LayerReport> =
        finished.reports().map(|(report, _)| (report.name.as_str(), report)).collect();
    let tensors = folder.unet.tensors()?;
    let task = Task::begin(progress, "writing the container", "tensors", tensors.len());
    let mut sums = Sums::default();
    for spec in tensors {
        task.advance(&spec.name);
        let layer = spec.name.strip_suffix(".weight").unwrap_or_default();
        let weight = if finished.has(layer) { finished.weight(layer)? } else { None };
        match weight {
            Some(weight) => {
                sums.elements += weight.numel() as u64;
                sums.kept += weight.kept() as u64;
                sums.bytes += weight.stored_bytes();
                let report = reports.get(layer).map_or(Value::Null, |layer| json!(layer.errors));
                writer.add_weight(&spec.name, &weight, report)?;
            }
            None => writer.add_tensor(&spec.name, &halves.tensor(&spec.name, &spec.shape)?)?,
        }
    }
    // Nothing of another model is in it: `sources` says what it was made from.
    weights.check_unchanged()?;
    Ok((writer.finish()?, sums))
}
