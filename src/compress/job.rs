//! A whole run: calibration, compression, container.

use std::path::Path;

use serde::Serialize;
use serde_json::{Map, Value, json};
use tch::{Device, Kind};

use super::{Compressed, LayerReport, Recipe, compress};
use crate::calibration::{PromptSet, Samples, record};
use crate::checkpoint::{ConfigFile, TensorSource, Weights};
use crate::config::{CalibrationSection, RunConfig};
use crate::container::{ContainerInfo, ContainerWriter, SourceFile, Written};
use crate::device::Placement;
use crate::error::{Error, Result};
use crate::model::unet::Unet;
use crate::pipeline::{PipelineFolder, PromptEncoder};
use crate::progress::Progress;

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
    /// Every treated layer, in execution order.
    pub layers: Vec<LayerReport>,
    /// Everything that had to be said on the way.
    pub notes: Vec<String>,
}

/// The calibration samples that a config asks for: read from its file, or recorded from its prompts.
///
/// # Errors
/// If the file or the prompts cannot be read, or the pipeline cannot run.
pub fn calibrate(
    folder: &PipelineFolder,
    weights: &Weights,
    section: &CalibrationSection,
    placement: Placement,
    progress: &dyn Progress,
) -> Result<Samples> {
    if let Some(path) = &section.samples {
        return Samples::read(path, folder.unet.config(), section.calibration_nsamples);
    }
    let set = PromptSet {
        prompts: section.prompts.load()?,
        seed: section.seed,
        steps: section.steps,
        guidance: section.guidance,
        size: folder.picture_size(section.size)?,
    };
    let encoder = PromptEncoder::load(folder, placement)?;
    let unet = Unet::resident(folder.unet.clone(), weights.source(placement), progress)?;
    record(folder, &encoder, &unet, &set, section.calibration_nsamples, progress)
}

/// Compresses the pipeline's UNet as `config` says and writes the container to `path`.
///
/// `samples` are used if they are given (several runs can share them); otherwise they are made if anything is pruned.
///
/// # Errors
/// If the config does not fit the model, calibration fails, a layer cannot be treated, or the container cannot be written.
pub fn run(
    folder: &PipelineFolder,
    config: &RunConfig,
    samples: Option<&Samples>,
    placement: Placement,
    path: &Path,
    progress: &dyn Progress,
) -> Result<JobReport> {
    let recipe = Recipe::new(config, &folder.unet)?;
    let weights = folder.unet_weights()?;
    let none = Samples::default();
    let made = match (samples, recipe.treatments.values().any(|treatment| treatment.prune.is_some())) {
        (None, true) => Some(calibrate(folder, &weights, &config.calibration, placement, progress)?),
        _ => None,
    };
    let samples = samples.or(made.as_ref()).unwrap_or(&none);
    let mut compressed = compress(&folder.unet, &weights.source(placement), &recipe.treatments, samples, placement, progress)?;
    let found = recipe.resolution.findings.iter().map(ToString::to_string);
    compressed.notes.splice(0..0, found);
    let settings = serde_yaml::from_str::<Value>(&config.to_yaml()).map_err(|why| Error::Argument(why.to_string()))?;
    let written = write_container(path, folder, &weights, &compressed, settings)?;

    let elements: u64 = compressed.weights.values().map(|weight| weight.numel() as u64).sum();
    let kept: u64 = compressed.weights.values().map(|weight| weight.kept() as u64).sum();
    let bytes: u64 = compressed.weights.values().map(|weight| weight.stored_bytes()).sum();
    let share = |part: u64| part as f64 / elements.max(1) as f64;
    Ok(JobReport {
        bytes: written.bytes,
        payload_bytes: written.payload_bytes,
        samples: samples.calls.len(),
        sparsity: 1.0 - share(kept),
        bits_per_weight: 8.0 * share(bytes),
        layers: compressed.layers,
        notes: compressed.notes,
    })
}

/// Writes compressed weights, and everything else of the UNet in fp16, to a container.
///
/// # Errors
/// If the model cannot be read again, or the container cannot be written.
pub fn write_container(
    path: &Path,
    folder: &PipelineFolder,
    weights: &Weights,
    compressed: &Compressed,
    recipe: Value,
) -> Result<Written> {
    let config = folder.root().join("unet/config.json");
    let unet_config: Map<String, Value> = ConfigFile::read(&config)?.into_entries();
    let mut sources = vec![SourceFile::read(&config, "unet/config.json")?];
    for file in weights.files() {
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        sources.push(SourceFile::read(file, format!("unet/{name}"))?);
    }
    let mut writer = ContainerWriter::create(path, ContainerInfo { unet_config, recipe, sources })?;
    let halves = weights.source(Placement { device: Device::Cpu, kind: Kind::Half });
    let reports: std::collections::BTreeMap<&str, &LayerReport> =
        compressed.layers.iter().map(|layer| (layer.name.as_str(), layer)).collect();
    for spec in folder.unet.tensors()? {
        let layer = spec.name.strip_suffix(".weight").unwrap_or_default();
        match compressed.weights.get(layer) {
            Some(weight) => {
                let report = reports.get(layer).map_or(Value::Null, |layer| json!(layer.errors));
                writer.add_weight(&spec.name, weight, report)?;
            }
            None => writer.add_tensor(&spec.name, &halves.tensor(&spec.name, &spec.shape)?)?,
        }
    }
    writer.finish()
}
