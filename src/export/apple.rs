//! What Apple's Swift pipeline would get wrong without a word.

use sdxl_model::scheduler::SchedulerConfig;

/// Why apple/ml-stable-diffusion's Swift pipeline would draw wrong pictures with a model of this
/// sampler; `None` if it would not. Its samplers take the output of every UNet for noise on Stable
/// Diffusion's schedule (`DPMSolverMultistepScheduler.swift`: "Assumes the model predicts
/// epsilon"), and nothing in a package can tell them otherwise.
#[must_use]
pub fn apple_mismatch(scheduler: &SchedulerConfig) -> Option<String> {
    let class = scheduler.class();
    if class.starts_with("EDM") {
        return Some(mismatch(&format!("is sampled by {class}, which scales the UNet's inputs and outputs in its own way")));
    }
    apple_mismatch_of_prediction(scheduler.text("prediction_type"))
}

/// As [`apple_mismatch`], where nothing but what the UNet predicts is known of its sampler.
#[must_use]
pub fn apple_mismatch_of_prediction(prediction_type: Option<&str>) -> Option<String> {
    match prediction_type {
        None | Some("epsilon") => None,
        Some(other) => Some(mismatch(&format!("predicts `{other}`, not noise"))),
    }
}

fn mismatch(what: &str) -> String {
    format!(
        "apple-scheduler: the model {what}; the samplers of Apple's Swift pipeline take its output for noise and draw \
         wrong pictures without an error: use the package with a sampler of your own"
    )
}
