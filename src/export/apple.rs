//! What Apple's Swift pipeline would get wrong without a word, and what a package does about it.
//!
//! Its samplers take the output of every UNet for noise (`DPMSolverMultistepScheduler.swift`:
//! "Assumes the model predicts epsilon"), on Stable Diffusion's noise schedule, and nothing in a
//! package can tell them otherwise.

use std::path::Path;

use sdxl_model::scheduler::SchedulerConfig;
use sdxl_pipeline::UnetWeights;
use serde_json::{Map, json};
use squeeze_base::error::{Error, Result};
use squeeze_coreml::{NoiseOutput, Predicted};

/// Why apple/ml-stable-diffusion's Swift pipeline would draw wrong pictures with a model of this
/// sampler, whatever a package does; `None` if it need not.
#[must_use]
pub fn apple_mismatch(scheduler: &SchedulerConfig) -> Option<String> {
    let class = scheduler.class();
    if class.starts_with("EDM") {
        return Some(mismatch(&format!("is sampled by {class}, which scales the UNet's inputs and outputs in its own way")));
    }
    if class.starts_with("FlowMatch") {
        return Some(mismatch(&format!("is sampled by {class}: its UNet was trained on flows from noise to pictures")));
    }
    match scheduler.prediction() {
        "epsilon" | "v_prediction" | "sample" => None,
        other => apple_mismatch_of_prediction(other),
    }
}

/// Why Apple's pipeline would draw wrong pictures with a package whose output is [what the UNet
/// predicts](SchedulerConfig::prediction), as a container records it.
#[must_use]
pub fn apple_mismatch_of_prediction(prediction: &str) -> Option<String> {
    match prediction {
        "epsilon" => None,
        other if other.starts_with("edm_") => {
            Some(mismatch("is sampled by EDM's samplers, which scale the UNet's inputs and outputs in their own way"))
        }
        other => Some(mismatch(&format!("predicts `{other}`, not noise"))),
    }
}

fn mismatch(what: &str) -> String {
    format!(
        "apple-scheduler: the model {what}; the samplers of Apple's Swift pipeline take its output for noise and draw \
         wrong pictures without an error: use the package with a sampler of your own"
    )
}

/// What a package does so that Apple's samplers draw right pictures.
#[derive(Debug, Clone, PartialEq)]
pub struct AppleNoise {
    /// How the program makes noise; `None` if the UNet predicts it on the schedule of Apple's
    /// samplers.
    pub output: Option<NoiseOutput>,
    /// What remains different.
    pub warnings: Vec<String>,
}

/// How the package of `weights`, a UNet for this sampler, makes noise on the schedule of Apple's
/// samplers.
///
/// Where the model was trained on another schedule, for example to begin with pure noise, the UNet
/// is told the timestep of its own schedule with the same share of noise, between two of them by
/// the logarithm of σ, as diffusers finds Karras's timesteps (`_sigma_to_t`).
///
/// # Errors
/// [`Error::Argument`] if there is no such way ([`apple_mismatch`]), or a container records another
/// prediction than the sampler is for; [`Error::ConfigKey`] if the config describes no noise
/// schedule.
pub fn apple_noise(weights: UnetWeights, scheduler: &SchedulerConfig) -> Result<AppleNoise> {
    if let Some(recorded) = weights.prediction_type().filter(|recorded| *recorded != scheduler.prediction()) {
        let (path, sampler) = (weights.path().display(), scheduler.prediction());
        return Err(Error::Argument(format!(
            "{path} holds a UNet that predicts `{recorded}`, and the sampler of the model is for one that predicts `{sampler}`: \
             name the model that the container was made from"
        )));
    }
    if let Some(mismatch) = apple_mismatch(scheduler) {
        return Err(Error::Argument(mismatch));
    }
    let predicted = match scheduler.prediction() {
        "v_prediction" => Predicted::Velocity,
        "sample" => Predicted::Picture,
        _ => Predicted::Noise,
    };
    let (own, apples) = (scheduler.signal()?, apples_signal()?);
    let own_timesteps = scheduler.training_timesteps()?;
    let mut warnings = Vec::new();
    let share = apples.last().copied().unwrap_or_default();
    let (signal, timesteps) = match is_equal(&own, &own_timesteps, &apples) {
        true => (own, None),
        false => {
            let timesteps = at_equal_noise(&own, &own_timesteps, &apples);
            (apples, Some(timesteps))
        }
    };
    if scheduler.ends_in_pure_noise()? {
        warnings.push(format!(
            "apple-zero-snr: the model was trained to begin with pure noise (`rescale_betas_zero_snr`), but Apple's samplers take \
             the first latents for {:.1} % picture, so that very dark and very bright pictures come out less so",
            100.0 * share
        ));
    } else if timesteps.is_some() {
        warnings.push(
            "apple-schedule: the model was trained on another noise schedule than that of Apple's samplers; the package tells the \
             UNet the timesteps of its own schedule with equal noise"
                .to_owned(),
        );
    }
    let output = (predicted != Predicted::Noise || timesteps.is_some()).then_some(NoiseOutput { predicted, signal, timesteps });
    Ok(AppleNoise { output, warnings })
}

/// ᾱ at the 1,000 timesteps of Apple's PNDM and DPM-Solver++ (`Scheduler.swift`, `.scaledLinear`
/// from 0.00085 to 0.012).
fn apples_signal() -> Result<Vec<f32>> {
    let config = json!({
        "_class_name": "PNDMScheduler", "num_train_timesteps": 1000,
        "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012,
    });
    let entries: Map<_, _> = config.as_object().cloned().unwrap_or_default();
    SchedulerConfig::from_entries(Path::new("Scheduler.swift"), entries)?.signal()
}

/// The logarithm of σ, the noise relative to the picture.
fn log_sigma(signal: f32) -> f64 {
    let signal = f64::from(signal);
    0.5 * ((1.0 - signal) / signal).ln()
}

/// Whether a model was trained at Apple's timesteps with Apple's noise, up to the rounding of fp32.
fn is_equal(own: &[f32], timesteps: &[f64], apples: &[f32]) -> bool {
    /// Of the logarithm of σ: a fiftieth of the least difference between two timesteps.
    const ROUNDING: f64 = 1e-4;
    let is_same = |(a, b): (&f32, &f32)| (log_sigma(*a) - log_sigma(*b)).abs() < ROUNDING;
    own.len() == apples.len()
        && own.iter().zip(apples).all(is_same)
        && timesteps.iter().enumerate().all(|(index, timestep)| *timestep == index as f64)
}

/// For each ᾱ of `apples` the timestep at which a model with the schedule `own` was trained on this
/// noise; beyond its ends the first or the last.
fn at_equal_noise(own: &[f32], timesteps: &[f64], apples: &[f32]) -> Vec<f32> {
    let table: Vec<(f64, f64)> = own.iter().zip(timesteps).map(|(signal, timestep)| (log_sigma(*signal), *timestep)).collect();
    let at = |signal: &f32| {
        let wanted = log_sigma(*signal);
        let (below, above) = table.split_at(table.partition_point(|(level, _)| *level < wanted));
        match (below.last(), above.first()) {
            (Some((low, from)), Some((high, to))) => from + (to - from) * (wanted - low) / (high - low),
            (Some((_, end)), None) | (None, Some((_, end))) => *end,
            (None, None) => 0.0,
        }
    };
    apples.iter().map(|signal| at(signal) as f32).collect()
}
