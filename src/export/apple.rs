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
    apple_mismatch_of_prediction(scheduler.prediction())
}

/// As [`apple_mismatch`], given [what the UNet predicts](SchedulerConfig::prediction), as a
/// container records it.
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
