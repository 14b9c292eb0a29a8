//! The containers of a comparison: compressed once, and found again by later runs.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;

use sdxl_model::checkpoint::{Blueprint, SafetensorsFile};
use sdxl_model::unet::UnetChain;
use sdxl_pipeline::PipelineFolder;
use serde::{Deserialize, Serialize};
use serde_json::json;
use squeeze_base::digest;
use squeeze_base::error::{Error, Result};
use squeeze_base::input::{self, Limit, SourceFile};
use squeeze_base::output::write_file;
use squeeze_base::progress::{Progress, Task};
use squeeze_base::{memory, number};
use squeeze_codebook::LayerKind;
use squeeze_container::Container;

use super::entry::{Entry, container_path, prices_path, row_path};
use crate::calibration::{Samples, calibrate, defaults};
use crate::compress::{BUILD, JobReport, Prepared, run};
use crate::config::{CalibrationSection, read_prompts};
use crate::plan;
use crate::recipe::RunOptions;
use crate::report::{LayerRow, Row};

/// What is known of a container without judging it.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Facts {
    /// Hash of everything that the container depends on.
    identity: String,
    /// SHA-256 of the container.
    sha256: String,
    /// The row of the report, without measurements.
    pub row: Row,
}

impl Facts {
    /// Hashes of what the container was made from, and of the container itself.
    pub(super) fn hashes(&self) -> (&str, &str) {
        (&self.identity, &self.sha256)
    }
}

/// The containers of `entries` in `out`. Those that are there already, made from the same config,
/// model and prompts by the same program, are taken; the others are compressed.
///
/// Entries with equal calibration sections share their samples. Before anything is computed every
/// entry is checked and planned (see [`Prepared`]), and the disk must have room for all of them
/// together.
///
/// # Errors
/// If an entry does not fit the model, `options`, the memory or the disk, or a run fails.
pub(super) fn made(
    folder: &PipelineFolder,
    entries: &[Entry],
    options: &RunOptions,
    out: &Path,
    progress: &dyn Progress,
) -> Result<Vec<Facts>> {
    let mut files = Files::of(folder, options);
    let found = entries.iter().map(|entry| found(entry, out, &mut files)).collect::<Result<Vec<_>>>()?;
    let missing: Vec<&Entry> = entries.iter().zip(&found).filter(|(_, found)| found.is_none()).map(|(entry, _)| entry).collect();
    let mut prepared = prepare(folder, &missing, options, out)?.into_iter();
    std::fs::create_dir_all(out).map_err(Error::write(out))?;
    let weights = folder.unet_weights()?;
    let kinds = layer_kinds(&folder.unet)?;
    let mut shared = SharedSamples::default();
    let task = Task::begin(progress, "comparing", "configs", entries.len());
    let mut facts = Vec::new();
    for (entry, found) in entries.iter().zip(found) {
        task.advance(&entry.name);
        let (None, Some(prepared)) = (&found, found.is_none().then(|| prepared.next()).flatten()) else {
            facts.extend(found);
            continue;
        };
        let config = &entry.config;
        let samples = if config.is_calibrated() {
            Some(shared.of(&config.calibration, || calibrate(folder, &weights, &config.calibration, options, progress))?)
        } else {
            None
        };
        // A peak that cannot be reset would be that of the entries before this one.
        let own_peak = memory::reset_peak();
        let start = Instant::now();
        let report = run(&prepared, samples, progress).map_err(named(&entry.name))?;
        let cost = Cost { seconds: start.elapsed().as_secs_f64(), peak_bytes: memory::peak().filter(|_| own_peak) };
        let container = Container::open(prepared.path())?;
        let bytes = container.layers().map(|layer| layer.bytes).sum();
        files.sources = Some(container.info().sources.clone());
        let made = Facts {
            identity: files.identity(entry)?,
            sha256: SourceFile::read(prepared.path(), "")?.sha256,
            row: Row { compressed_weight_bytes: bytes, ..row(entry, report, &kinds, cost) },
        };
        let text = serde_json::to_vec_pretty(&made).map_err(|why| Error::internal(format!("a row cannot be written: {why}")))?;
        write_file(&row_path(out, &entry.name), |file| file.write_all(&text))?;
        facts.push(made);
    }
    Ok(facts)
}

/// The containers of `entries`, all of which must be in `out` already.
///
/// # Errors
/// [`Error::Argument`] naming the first that is missing, or was made from something else.
pub(super) fn all_found(folder: &PipelineFolder, entries: &[Entry], options: &RunOptions, out: &Path) -> Result<Vec<Facts>> {
    let mut files = Files::of(folder, options);
    let each = entries.iter().map(|entry| {
        found(entry, out, &mut files)?.ok_or_else(|| {
            Error::Argument(format!(
                "{} is missing, or was made otherwise: run the same command with --containers-only in the place of --part first",
                container_path(out, &entry.name).display()
            ))
        })
    });
    each.collect()
}

/// The container of an entry, if it is there and is what compressing would make.
fn found(entry: &Entry, out: &Path, files: &mut Files<'_>) -> Result<Option<Facts>> {
    let (container, facts) = (container_path(out, &entry.name), row_path(out, &entry.name));
    if !facts.is_file() || !container.is_file() {
        return Ok(None);
    }
    let content = input::read(&facts, Limit::RUN_STATE)?;
    let read: Facts = match serde_json::from_slice(&content) {
        Ok(read) => read,
        Err(why) => {
            tracing::warn!("{} is not read, so its config is compressed: {why}", facts.display());
            return Ok(None);
        }
    };
    if read.identity != files.identity(entry)? || read.sha256 != SourceFile::read(&container, "")?.sha256 {
        tracing::info!("{} is from another run, so it is made anew", container.display());
        return Ok(None);
    }
    tracing::info!("{} is there already", container.display());
    Ok(Some(Facts { row: Row { name: entry.name.clone(), curve: entry.curve.clone(), ..read.row }, ..read }))
}

/// The files that containers are made from, each of which is hashed at most once.
struct Files<'a> {
    folder: &'a PipelineFolder,
    options: &'a RunOptions,
    /// Those of the UNet.
    sources: Option<Vec<SourceFile>>,
    /// Those that encode prompts.
    encoders: Option<Vec<SourceFile>>,
}

impl<'a> Files<'a> {
    fn of(folder: &'a PipelineFolder, options: &'a RunOptions) -> Self {
        Files { folder, options, sources: None, encoders: None }
    }

    /// A hash of all that the container of `entry` depends on.
    fn identity(&mut self, entry: &Entry) -> Result<String> {
        let (folder, config) = (self.folder, &entry.config);
        if self.sources.is_none() {
            let surveyed = folder.unet_weights()?.survey(folder.unet_folder(), |_| {})?;
            let config = folder.unet_config_file().cloned().into_iter();
            self.sources = Some(config.chain(surveyed).chain(folder.lora_files()?).collect());
        }
        if self.encoders.is_none() && config.is_calibrated() {
            self.encoders = Some(folder.prompt_files()?);
        }
        let section = &config.calibration;
        let defaults = defaults(folder);
        let prompts = if config.is_calibrated() && section.samples.is_none() { section.prompts.load()? } else { Vec::new() };
        let captions = section.captions.as_deref().map(read_prompts).transpose()?;
        let samples = section.samples.as_deref().map(|path| SafetensorsFile::open(path)?.sha256()).transpose()?;
        let all = json!({
            "version": env!("CARGO_PKG_VERSION"),
            "build": BUILD,
            "config": config.to_yaml(),
            "defaults": (defaults.steps, defaults.guidance),
            "model": self.sources,
            "encoders": self.encoders.as_ref().filter(|_| config.is_calibrated()),
            "prompts": prompts,
            "captions": captions,
            "samples": samples,
            "device and dtype": format!("{:?} {:?}", self.options.devices.as_slice(), self.options.kind),
        });
        Ok(digest::of_bytes(all.to_string().as_bytes()))
    }
}

/// Puts the name of an entry before an error that does not say what it is about.
fn named(name: &str) -> impl Fn(Error) -> Error {
    move |why| match why {
        Error::Argument(_) | Error::Shape { .. } | Error::Range { .. } | Error::State(_) => {
            Error::Argument(format!("{name}: {why}"))
        }
        why => why,
    }
}

/// Checks and plans entries. The containers stay, so an entry needs its own bytes on the disk and
/// those of the containers before it.
fn prepare<'a>(folder: &'a PipelineFolder, entries: &[&Entry], options: &RunOptions, out: &Path) -> Result<Vec<Prepared<'a>>> {
    let mut prepared: Vec<Prepared> = Vec::new();
    let (mut results, mut needed) = (0, 0);
    for Entry { name, config, curve } in entries.iter().copied() {
        let entry = Prepared::new(folder, config, true, options, &container_path(out, name)).map_err(named(name))?;
        let entry = match curve {
            Some(curve) => entry.with_prices(prices_path(out, curve)),
            None => entry,
        };
        needed = needed.max(results + entry.plan().disk.peak());
        results += entry.plan().disk.result;
        prepared.push(entry);
    }
    if prepared.is_empty() {
        return Ok(prepared);
    }
    plan::check_disk(out, needed, 0, &format!("{} of {} runs", number::size(needed), entries.len()))?;
    Ok(prepared)
}

/// Calibration samples that are drawn once for each distinct calibration section.
#[derive(Default)]
struct SharedSamples(Vec<(CalibrationSection, Samples)>);

impl SharedSamples {
    /// The samples of `section`, which `draw` makes if there are none yet.
    fn of(&mut self, section: &CalibrationSection, draw: impl FnOnce() -> Result<Samples>) -> Result<&Samples> {
        let index = match self.0.iter().position(|(drawn, _)| drawn == section) {
            Some(index) => index,
            None => {
                self.0.push((section.clone(), draw()?));
                self.0.len() - 1
            }
        };
        Ok(&self.0[index].1)
    }
}

/// Cost of a compression.
struct Cost {
    seconds: f64,
    peak_bytes: Option<u64>,
}

/// A row without the bytes of its compressed weights and without measurements.
fn row(entry: &Entry, report: JobReport, kinds: &BTreeMap<String, LayerKind>, cost: Cost) -> Row {
    let Entry { name, config, curve } = entry;
    let settings = config.prune.as_ref().and_then(|prune| prune.rules.global_config.as_ref());
    Row {
        name: name.clone(),
        curve: curve.clone(),
        config_yaml: config.to_yaml(),
        sparsity_asked: settings.map(|settings| settings.sparsity.target()),
        sparsity_stored: report.sparsity,
        bits_per_weight: report.bits_per_weight,
        bytes: report.bytes,
        seconds: cost.seconds,
        peak_bytes: cost.peak_bytes,
        layers: layer_rows(&report, kinds),
        warnings: report.notes,
        ..Row::default()
    }
}

/// The kind of each layer of the UNet, by its name.
fn layer_kinds(chain: &UnetChain) -> Result<BTreeMap<String, LayerKind>> {
    let mut kinds = BTreeMap::new();
    for name in chain.parts() {
        let part = chain.load_part(name, &Blueprint::default())?;
        kinds.extend(part.layers().iter().map(|layer| (layer.name().to_owned(), layer.kind())));
    }
    Ok(kinds)
}

fn layer_rows(report: &JobReport, kinds: &BTreeMap<String, LayerKind>) -> Vec<LayerRow> {
    report
        .layers
        .iter()
        .map(|layer| LayerRow {
            name: layer.name.clone(),
            stage: layer.stage.clone(),
            kind: kinds[&layer.name].to_string(),
            shape: layer.shape.clone(),
            bits_per_weight: layer.bits_per_weight,
            sparsity: layer.sparsity,
            bytes: layer.bytes,
            vectors: layer.vectors,
            weight_error: layer.errors.weight,
            pruned_error: layer.errors.pruned_output,
            output_error: layer.errors.output,
        })
        .collect()
}
