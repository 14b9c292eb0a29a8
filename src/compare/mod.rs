//! Comparison of several configs on one model: size, closeness to the dense model, cost.

mod judge;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

pub use judge::{Judge, Measured};
use sdxl_model::checkpoint::Blueprint;
use sdxl_model::unet::{Unet, UnetChain};
use sdxl_pipeline::PipelineFolder;
use squeeze_base::error::{Error, Result};
use squeeze_base::memory;
use squeeze_base::number;
use squeeze_base::progress::{Progress, Task};
use squeeze_base::shorten::shorten;
use squeeze_codebook::LayerKind;
use squeeze_container::Container;

use crate::calibration::{PromptSet, Samples, calibrate};
use crate::compress::{JobReport, Prepared, run};
use crate::config::{CalibrationSection, RunConfig, read_prompts};
use crate::plan;
use crate::recipe::RunOptions;
use crate::report::metrics::closeness;
use crate::report::{Comparison, Dense, Judged, LayerRow, Row, StageError};

/// A config and the name of its row.
#[derive(Debug)]
pub struct Entry {
    /// For example `squeeze-s40-4bit-gs16`.
    pub name: String,
    /// The run.
    pub config: RunConfig,
}

/// Compresses with the config of every entry, judges each result on `judged`, and leaves the
/// containers in `out`.
///
/// Entries with equal calibration sections share their samples, and all entries share the dense
/// model's pictures. Before anything is computed every entry is checked and planned (see
/// [`Prepared`]), and the disk must have room for all of them together.
///
/// # Errors
/// If there are no entries, two have one name, one does not fit the model, `options`, the memory or
/// the disk, a judged prompt is among the calibration's, or a run fails.
pub fn compare(
    folder: &PipelineFolder,
    entries: &[Entry],
    judged: PromptSet,
    held_out: usize,
    options: &RunOptions,
    out: &Path,
    progress: &dyn Progress,
) -> Result<Comparison> {
    let prepared = prepare(folder, entries, options, out)?;
    let calibration = calibration_prompts(entries, &judged)?;
    std::fs::create_dir_all(out).map_err(Error::write(out))?;
    let placement = options.placement();
    let weights = folder.unet_weights()?;
    let source = weights.source(placement);
    let (judge, warnings) = {
        let encoder = judged.encoder(folder, placement)?;
        let unet = Unet::resident(folder.unet.clone(), source, progress)?;
        (Judge::record(folder, &encoder, &unet, judged, held_out, progress)?, unet.beyond_half())
    };
    let dense_pictures: Vec<_> = judge.pictures().cloned().collect();
    let dense =
        Dense { name: "dense".into(), bytes: bytes_of_files(weights.files())?, bits_per_weight: 16.0, pictures: dense_pictures };
    let kinds = layer_kinds(&folder.unet)?;
    let mut shared = SharedSamples::default();
    let mut rows = Vec::new();
    let task = Task::begin(progress, "comparing", "configs", entries.len());
    for (entry, prepared) in entries.iter().zip(&prepared) {
        task.advance(&entry.name);
        let config = &entry.config;
        let samples = if config.is_calibrated() {
            Some(shared.of(&config.calibration, || calibrate(folder, &weights, &config.calibration, options, progress))?)
        } else {
            None
        };
        // A peak that cannot be reset would be that of the entries before this one.
        let own_peak = memory::reset_peak();
        let start = Instant::now();
        let mut report = run(prepared, samples, progress)?;
        let cost = Cost { seconds: start.elapsed().as_secs_f64(), peak_bytes: memory::peak().filter(|_| own_peak) };
        // Judged on the stored weights, read back.
        let container = Container::open(prepared.path())?;
        let stored = sdxl_pipeline::UnetWeights::from(&container).source(placement);
        let unet = Unet::resident(folder.unet.clone(), stored, progress)?;
        let measured = judge.measure(folder, &unet, progress)?;
        report.notes.extend(unet.beyond_half().into_iter().map(|note| format!("judged runs: {note}")));
        drop(unet);
        let stages = judge.stage_errors(&folder.unet, &source, &stored)?;
        let compressed_weight_bytes = container.layers().map(|layer| layer.bytes).sum();
        rows.push(Row {
            compressed_weight_bytes,
            stages: stages.into_iter().map(|(name, error)| StageError { name: name.to_string(), error }).collect(),
            ..row(entry, report, &kinds, cost, &dense, measured)?
        });
    }
    let (set, root) = (judge.set(), folder.root());
    Ok(Comparison {
        title: format!("{} compressed", root.file_name().unwrap_or(root.as_os_str()).to_string_lossy()),
        model: root.display().to_string(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        created_by: format!("sdxl-squeeze {} compare", env!("CARGO_PKG_VERSION")),
        device: format!("{:?}, {:?}, {} threads", placement.device, placement.kind, tch::get_num_threads()).to_lowercase(),
        calibration,
        judged: (0..)
            .zip(&set.prompts)
            .map(|(i, prompt)| Judged { prompt: prompt.clone(), seed: set.seed.wrapping_add(i) })
            .collect(),
        dense,
        rows,
        warnings,
        how: how(set, judge.held_out()),
    })
}

/// Path of the container of the entry `name`.
#[must_use]
pub fn container_path(out: &Path, name: &str) -> PathBuf {
    out.join(format!("{name}.squeezed.safetensors"))
}

/// Checks and plans every entry. The containers stay, so an entry needs its own bytes on the disk
/// and those of the containers before it.
fn prepare<'a>(folder: &'a PipelineFolder, entries: &[Entry], options: &RunOptions, out: &Path) -> Result<Vec<Prepared<'a>>> {
    let mut prepared: Vec<Prepared> = Vec::new();
    let (mut results, mut needed) = (0, 0);
    for (index, Entry { name, config }) in entries.iter().enumerate() {
        if entries[..index].iter().any(|earlier| earlier.name == *name) {
            return Err(Error::Argument(format!("two of the configs to compare are called `{name}`; rename one")));
        }
        let named = |why: Error| match why {
            Error::Argument(_) | Error::Shape { .. } | Error::Range { .. } | Error::State(_) => {
                Error::Argument(format!("{name}: {why}"))
            }
            why => why,
        };
        let entry = Prepared::new(folder, config, true, options, &container_path(out, name)).map_err(named)?;
        needed = needed.max(results + entry.plan().disk.peak());
        results += entry.plan().disk.result;
        prepared.push(entry);
    }
    if prepared.is_empty() {
        return Err(Error::Argument("there is nothing to compare".into()));
    }
    plan::check_disk(out, needed, 0, &format!("{} of {} runs", number::size(needed), entries.len()))?;
    Ok(prepared)
}

/// Every prompt that an entry is calibrated on, once.
///
/// # Errors
/// [`Error::Argument`] if one of them, or a caption of a calibration, is among the judged prompts;
/// if a file of prompts cannot be read.
fn calibration_prompts(entries: &[Entry], judged: &PromptSet) -> Result<Vec<String>> {
    let refuse =
        |prompt: &str, verb: &str| Err(Error::Argument(format!("`{}` is judged on, so it cannot be {verb}", shorten(prompt))));
    let mut calibration: Vec<String> = Vec::new();
    for entry in entries.iter().filter(|entry| entry.config.is_calibrated() && entry.config.calibration.samples.is_none()) {
        let section = &entry.config.calibration;
        for prompt in section.prompts.load()? {
            if judged.prompts.contains(&prompt) {
                return refuse(&prompt, "calibrated on");
            }
            if !calibration.contains(&prompt) {
                calibration.push(prompt);
            }
        }
        if let Some(path) = &section.captions
            && let Some(caption) = read_prompts(path)?.into_iter().find(|caption| judged.prompts.contains(caption))
        {
            return refuse(&caption, "a caption of the calibration");
        }
    }
    Ok(calibration)
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

fn bytes_of_files<'a>(files: impl Iterator<Item = &'a Path>) -> Result<u64> {
    files.map(|file| Ok(std::fs::metadata(file).map_err(Error::read(file))?.len())).sum()
}

/// Cost of a compression.
struct Cost {
    seconds: f64,
    peak_bytes: Option<u64>,
}

/// A row without the bytes of its compressed weights and without its stages.
fn row(
    entry: &Entry,
    report: JobReport,
    kinds: &BTreeMap<String, LayerKind>,
    cost: Cost,
    dense: &Dense,
    measured: Measured,
) -> Result<Row> {
    let Entry { name, config } = entry;
    let close = closeness(&dense.pictures, &measured.pictures)?;
    let settings = config.prune.as_ref().and_then(|prune| prune.rules.global_config.as_ref());
    Ok(Row {
        name: name.clone(),
        config_yaml: config.to_yaml(),
        sparsity_asked: settings.map(|settings| settings.sparsity.target()),
        sparsity_stored: report.sparsity,
        bits_per_weight: report.bits_per_weight,
        bytes: report.bytes,
        unet_error: measured.unet_error,
        latent_error_by_step: measured.latent_error_by_step,
        psnr: close.psnr,
        ssim: close.ssim,
        seconds: cost.seconds,
        peak_bytes: cost.peak_bytes,
        layers: layer_rows(&report, kinds),
        pictures: measured.pictures,
        warnings: report.notes,
        ..Row::default()
    })
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

/// The report's explanations of its measurements.
fn how(set: &PromptSet, held_out: usize) -> Vec<String> {
    vec![
        format!(
            "Every row is the container as written, read back. It draws {} prompts that calibration has not seen, {} steps of \
             {} at guidance {}{}, from the same noise as the dense model.",
            set.prompts.len(),
            set.steps,
            set.scheduler.class(),
            set.guidance,
            match (set.reading.clip_skip, set.reading.long_prompts) {
                (0, false) => String::new(),
                (0, true) => ", long prompts in pieces".to_owned(),
                (skip, false) => format!(", clip_skip {skip}"),
                (skip, true) => format!(", clip_skip {skip}, long prompts in pieces"),
            }
        ),
        format!(
            "UNet error: ‖compressed - dense‖² / ‖dense‖² of the UNet's outputs over {held_out} of the dense model's own calls, \
             spread over prompts and timesteps."
        ),
        "Latent error: the relative squared error of the latents after each step, mean over the prompts.".into(),
        "PSNR and SSIM: each picture against the dense model's picture at the same seed; mean and worst.".into(),
        "Layer errors: the relative squared error of a layer's output on its calibration inputs if it has any, else of its \
         weights."
            .into(),
        "Stage errors: the relative squared error of a stage's output on the calls of the UNet error, with all stages before it \
         compressed too."
            .into(),
        "Bytes: the file, with its header. Seconds and peak memory: the compression alone; calibration runs are shared.".into(),
    ]
}
