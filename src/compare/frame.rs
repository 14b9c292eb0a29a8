//! A report before anything is measured.

use std::path::Path;

use sdxl_model::checkpoint::Weights;
use sdxl_pipeline::PipelineFolder;
use squeeze_base::error::{Error, Result};
use squeeze_base::number;
use squeeze_base::shorten::shorten;
use squeeze_numerics::device::Placement;
use tch::Kind;

use super::bootstrap::RESAMPLES;
use super::containers::Facts;
use super::entry::Entry;
use super::judge::{Judge, floor_kind};
use super::judging::Judging;
use super::pairs::Pair;
use crate::calibration::PromptSet;
use crate::config::{Feed, read_prompts};
use crate::report::{Comparison, Dense, Judged, Row};

/// The comparison without measurements and pictures. `calibration` are the prompts of
/// [`calibration_prompts`].
///
/// # Errors
/// If the size of the model's files cannot be read.
pub(super) fn frame(
    folder: &PipelineFolder,
    weights: &Weights,
    judging: &Judging,
    judge: &Judge<'_>,
    placement: Placement,
    calibration: Vec<String>,
    facts: Vec<Facts>,
) -> Result<Comparison> {
    let (set, root) = (&judging.set, folder.root());
    let rows: Vec<Row> = facts.into_iter().map(|facts| facts.row).collect();
    let has_curve = rows.iter().any(|row| row.curve.is_some());
    let judged = |pair: &Pair| Judged { prompt: set.prompts[pair.prompt].clone(), seed: pair.seed };
    Ok(Comparison {
        title: format!("{} compressed", root.file_name().unwrap_or(root.as_os_str()).to_string_lossy()),
        model: root.display().to_string(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        created_by: format!("sdxl-squeeze {} compare", env!("CARGO_PKG_VERSION")),
        device: format!("{:?}, {:?}, {} threads", placement.device, placement.kind, tch::get_num_threads()).to_lowercase(),
        calibration,
        judged: judge.pairs().iter().map(judged).collect(),
        dense: Dense {
            name: "dense".into(),
            bytes: bytes_of_files(weights.files())?,
            bits_per_weight: 16.0,
            pictures: Vec::new(),
        },
        noise_floor: judging.noise_floor.then(|| floor(placement.kind)),
        baseline: judging.baseline.clone().or_else(|| rows.first().map(|row| row.name.clone())).unwrap_or_default(),
        rows,
        warnings: Vec::new(),
        how: how(judging, judge, placement.kind, has_curve),
    })
}

/// The row of the noise floor, without measurements.
fn floor(kind: Kind) -> Row {
    Row {
        name: format!("dense, {}", dtype(floor_kind(kind))),
        sparsity_stored: f64::NAN,
        bits_per_weight: f64::NAN,
        seconds: f64::NAN,
        ..Row::default()
    }
}

fn dtype(kind: Kind) -> &'static str {
    match kind {
        Kind::Half => "fp16",
        Kind::BFloat16 => "bf16",
        _ => "fp32",
    }
}

fn bytes_of_files<'a>(files: impl Iterator<Item = &'a Path>) -> Result<u64> {
    files.map(|file| Ok(std::fs::metadata(file).map_err(Error::read(file))?.len())).sum()
}

/// Every prompt that an entry is calibrated on, once.
///
/// # Errors
/// [`Error::Argument`] if one of them, a caption of a calibration or a prompt that layers are tuned
/// on is among the judged prompts; if a file of prompts cannot be read.
pub(super) fn calibration_prompts(entries: &[Entry], judged: &PromptSet) -> Result<Vec<String>> {
    let check = |prompts: &[String], verb: &str| match prompts.iter().find(|prompt| judged.prompts.contains(prompt)) {
        Some(prompt) => Err(Error::Argument(format!("`{}` is judged on, so it cannot be {verb}", shorten(prompt)))),
        None => Ok(()),
    };
    let mut calibration: Vec<String> = Vec::new();
    for Entry { config, .. } in entries {
        let section = &config.calibration;
        if let Some(tune) = &config.tune {
            check(&tune.prompts.as_ref().unwrap_or(&section.prompts).load()?, "tuned on")?;
        }
        if !config.is_calibrated() {
            continue;
        }
        if let Some(path) = &section.captions {
            check(&read_prompts(path)?, "a caption of the calibration")?;
        }
        // Samples that are given do not say which prompts they were drawn with.
        if section.samples.is_none() {
            let prompts = section.prompts.load()?;
            check(&prompts, "calibrated on")?;
            for prompt in prompts {
                if !calibration.contains(&prompt) {
                    calibration.push(prompt);
                }
            }
        }
    }
    Ok(calibration)
}

/// The report's explanations of its measurements. `has_curve` says whether rows belong to curves.
fn how(judging: &Judging, judge: &Judge<'_>, kind: Kind, has_curve: bool) -> Vec<String> {
    let set = &judging.set;
    let noises = match judging.seeds {
        1 => String::new(),
        noises => format!(" with {noises} noises each"),
    };
    let mut how = vec![
        format!(
            "Every row is the container as written, read back. It draws {} prompts{noises} that calibration has not seen, {} steps \
             of {} at guidance {}{}, from the same noise as the dense model.",
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
            "UNet error: ‖compressed - dense‖² / ‖dense‖² of the UNet's outputs over {} of the dense model's own calls, spread over \
             prompts and timesteps.",
            judge.held_out()
        ),
        "Latent error: the relative squared error of the latents after each step, mean over the pictures.".into(),
        "PSNR and SSIM: each picture against the dense model's picture at the same seed; mean and worst.".into(),
    ];
    if set.feed == Feed::Swift {
        how.push(
            "The UNet is fed as by Apple's Swift pipeline: the encoded empty text as the negative prompt, time ids of 1,024 x 1,024 \
             pixels at every size."
                .into(),
        );
    }
    if judging.lpips.is_some() {
        how.push(
            "LPIPS: the perceptual distance to the dense model's picture, with AlexNet, version 0.1; lower is closer.".into(),
        );
    }
    if judging.noise_floor {
        how.push(format!(
            "The row `dense, {}` is the dense model with weights and activations in {}, against the dense model in {}: so far \
             pictures differ by rounding alone.",
            dtype(floor_kind(kind)),
            dtype(floor_kind(kind)),
            dtype(kind)
        ));
    }
    if set.prompts.len() > 1 {
        how.push(format!(
            "Intervals: the 95 % confidence interval over prompts by the bootstrap (BCa, {} resamples). Prompts are drawn again \
             with all of their noises, and every config on the same prompts, so that a difference is that of pairs. With a dozen \
             prompts or fewer intervals are too narrow.",
            number::count(RESAMPLES as u64)
        ));
    }
    if has_curve {
        how.push(
            "Curves: one config at several sizes. What its settings cost is measured once, in the time of the size that was \
             compressed first. Between two sizes the error is interpolated: its logarithm is taken as linear in the bytes."
                .into(),
        );
    }
    how.extend([
        "Layer errors: the relative squared error of a layer's output on its calibration inputs if it has any, else of its \
         weights."
            .into(),
        "Stage errors: the relative squared error of a stage's output on the calls of the UNet error, with all stages before it \
         compressed too."
            .into(),
        "Bytes: the file, with its header. Seconds and peak memory: the compression alone; calibration runs are shared.".into(),
    ]);
    how
}
