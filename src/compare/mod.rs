//! Runs several configs on one model and says what each of them costs.

mod judge;

use std::path::{Path, PathBuf};
use std::time::Instant;

pub use judge::{Judge, Measured};

use crate::calibration::{PromptSet, Samples, calibrate};
use crate::compress::{JobReport, Prepared, run};
use crate::config::{CalibrationSection, RunConfig, read_prompts};
use crate::container::Container;
use crate::error::{Error, Result};
use crate::memory;
use crate::model::unet::Unet;
use crate::number;
use crate::pipeline::{PipelineFolder, PromptEncoder};
use crate::plan;
use crate::progress::{Progress, Task};
use crate::recipe::RunOptions;
use crate::report::metrics::closeness;
use crate::report::{Comparison, Dense, Judged, LayerRow, Row, StageError};
use crate::shorten::shorten;

/// A config under the name that its row will have.
#[derive(Debug)]
pub struct Entry {
    /// `tutorial-s40-4bit-gs16`, say.
    pub name: String,
    /// The run.
    pub config: RunConfig,
}

/// Compresses with every entry's config, judges each result on `judged`, and leaves the containers in `out`.
///
/// Entries with the same calibration share its samples, and all share the dense model's pictures.
///
/// All that can be checked is checked before anything is drawn: every entry is [prepared](Prepared), and all have to fit on the disk together.
///
/// # Errors
/// If there are no entries, two have one name, one does not fit the model, `options`, the memory or the disk, a judged prompt is among the
/// calibration's, or a run fails.
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
    let mut calibration: Vec<String> = Vec::new();
    for entry in entries.iter().filter(|entry| entry.config.is_calibrated() && entry.config.calibration.samples.is_none()) {
        for prompt in entry.config.calibration.prompts.load()? {
            if judged.prompts.contains(&prompt) {
                return Err(Error::Argument(format!("`{}` is judged on, so it cannot be calibrated on", shorten(&prompt))));
            }
            if !calibration.contains(&prompt) {
                calibration.push(prompt);
            }
        }
        if let Some(path) = &entry.config.calibration.captions
            && let Some(caption) = read_prompts(path)?.into_iter().find(|caption| judged.prompts.contains(caption))
        {
            return Err(Error::Argument(format!(
                "`{}` is judged on, so it cannot be a caption of the calibration",
                shorten(&caption)
            )));
        }
    }
    std::fs::create_dir_all(out).map_err(Error::write(out))?;
    let placement = options.placement();
    let weights = folder.unet_weights()?;
    let source = weights.source(placement);
    let judge = {
        let encoder = PromptEncoder::load(folder, placement)?;
        let unet = Unet::resident(folder.unet.clone(), source, progress)?;
        Judge::record(folder, &encoder, &unet, judged, held_out, progress)?
    };
    let dense_pictures: Vec<_> = judge.pictures().cloned().collect();
    let mut shared: Vec<(CalibrationSection, Samples)> = Vec::new();
    let mut rows = Vec::new();
    let task = Task::begin(progress, "comparing", "configs", entries.len());
    for (Entry { name, config }, prepared) in entries.iter().zip(&prepared) {
        task.advance(name);
        let samples = match (config.is_calibrated(), shared.iter().position(|(section, _)| *section == config.calibration)) {
            (false, _) => None,
            (true, Some(index)) => Some(index),
            (true, None) => {
                let samples = calibrate(folder, &weights, &config.calibration, options, progress)?;
                shared.push((config.calibration.clone(), samples));
                Some(shared.len() - 1)
            }
        };
        memory::reset_peak();
        let start = Instant::now();
        let report = run(prepared, samples.map(|index| &shared[index].1), progress)?;
        let (seconds, peak_bytes) = (start.elapsed().as_secs_f64(), memory::peak());
        // Judged on what was stored, read back.
        let container = Container::open(prepared.path())?;
        let stored = crate::pipeline::UnetWeights::from(&container).source(placement);
        let unet = Unet::resident(folder.unet.clone(), stored, progress)?;
        let measured = judge.measure(folder, &unet, progress)?;
        drop(unet);
        let stages = judge.stage_errors(&folder.unet, &source, &stored)?;
        let close = closeness(&dense_pictures, &measured.pictures)?;
        rows.push(Row {
            name: name.clone(),
            config_yaml: config.to_yaml(),
            sparsity_asked: config
                .prune
                .as_ref()
                .and_then(|prune| prune.rules.global_config.as_ref())
                .map(|settings| settings.sparsity.target()),
            sparsity_stored: report.sparsity,
            bits_per_weight: report.bits_per_weight,
            bytes: report.bytes,
            compressed_weight_bytes: container.layers().map(|layer| layer.bytes).sum(),
            unet_error: measured.unet_error,
            latent_error_by_step: measured.latent_error_by_step,
            psnr: close.psnr,
            ssim: close.ssim,
            seconds,
            peak_bytes,
            stages: stages.into_iter().map(|(name, error)| StageError { name: name.to_string(), error }).collect(),
            layers: layer_rows(&report),
            pictures: measured.pictures,
            warnings: report.notes,
        });
    }
    let set = judge.set();
    Ok(Comparison {
        title: format!("{} compressed", folder.root().file_name().unwrap_or_default().to_string_lossy()),
        model: folder.root().display().to_string(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        created_by: format!("sdxl-squeeze {} compare", env!("CARGO_PKG_VERSION")),
        device: format!("{:?}, {:?}, {} threads", placement.device, placement.kind, tch::get_num_threads()).to_lowercase(),
        calibration,
        judged: (0..)
            .zip(&set.prompts)
            .map(|(i, prompt)| Judged { prompt: prompt.clone(), seed: set.seed.wrapping_add(i) })
            .collect(),
        dense: Dense {
            name: "dense".into(),
            bytes: weights.files().map(|file| std::fs::metadata(file).map_or(0, |file| file.len())).sum(),
            bits_per_weight: 16.0,
            pictures: dense_pictures,
        },
        rows,
        warnings: Vec::new(),
        how: how(set, judge.held_out()),
    })
}

/// Where the container of the entry `name` will be.
pub fn container_path(out: &Path, name: &str) -> PathBuf {
    out.join(format!("{name}.squeezed.safetensors"))
}

/// Every entry, checked. The containers stay, so what an entry takes on the disk comes to those of the entries before it.
fn prepare<'a>(folder: &'a PipelineFolder, entries: &[Entry], options: &RunOptions, out: &Path) -> Result<Vec<Prepared<'a>>> {
    let mut prepared: Vec<Prepared> = Vec::new();
    let (mut results, mut needed) = (0, 0);
    for (index, Entry { name, config }) in entries.iter().enumerate() {
        if entries.iter().take(index).any(|other| other.name == *name) {
            return Err(Error::Argument(format!("two of the configs to compare are called `{name}`; rename one")));
        }
        let named = |why: Error| match why {
            Error::Argument(why) => Error::Argument(format!("{name}: {why}")),
            other => other,
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

fn layer_rows(report: &JobReport) -> Vec<LayerRow> {
    report
        .layers
        .iter()
        .map(|layer| LayerRow {
            name: layer.name.clone(),
            stage: layer.stage.clone(),
            kind: if layer.shape.len() == 4 { "Conv2d".into() } else { "Linear".into() },
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

fn how(set: &PromptSet, held_out: usize) -> Vec<String> {
    vec![
        format!(
            "Every row is the container as written, read back. It draws {} prompts that calibration has not seen, {} steps at guidance {}, from the same noise as the dense model.",
            set.prompts.len(),
            set.steps,
            set.guidance
        ),
        format!(
            "UNet error: the squared distance of the outputs from the dense model's, relative to their own square, over {held_out} of the dense model's own calls, spread over prompts and timesteps."
        ),
        "Latent error: the same of the latents after each step, mean over the prompts.".into(),
        "PSNR and SSIM: of each picture to the dense model's at the same seed; mean and worst.".into(),
        "Layer errors: the same of a layer's output on its calibration inputs where there are any, else of its weights.".into(),
        "Stage errors: the same of a stage's output on the same calls, with all stages before it compressed too.".into(),
        "Bytes: the file, with its header. Seconds and peak memory: of compressing alone; calibration runs are shared.".into(),
    ]
}
