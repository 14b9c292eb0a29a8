//! The section `tune`.

use serde::Serialize;

use super::fields::Fields;
use super::keys::tune::*;
use super::mistake::Mistakes;
use super::prompts::{self, Prompts};
use super::words::TuneWeighting;

/// Training of palette entries, norms and biases after the layers are compressed.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TuneSection {
    /// The prompts whose trajectories are learned from; `None` is the calibration's.
    pub prompts: Option<Prompts>,
    /// How many UNet calls are taken, evenly over prompts and timesteps. At least 1.
    pub nsamples: usize,
    /// Steps of the optimizer. At least 1.
    pub steps: usize,
    /// UNet calls in each step. At least 1.
    pub batch: usize,
    /// The share of a tensor's mean magnitude by which a step moves its values at most, about.
    pub learning_rate: f64,
    /// How much the error of a call counts.
    pub timestep_weighting: TuneWeighting,
}

impl Default for TuneSection {
    fn default() -> Self {
        TuneSection {
            prompts: None,
            nsamples: NSAMPLES.default_value(),
            steps: STEPS.default_value(),
            batch: BATCH.default_value(),
            learning_rate: LEARNING_RATE.default_value(),
            timestep_weighting: TIMESTEP_WEIGHTING.default_value(),
        }
    }
}

impl TuneSection {
    pub(super) fn read(fields: &Fields<'_>, mistakes: &mut Mistakes<'_>) -> Self {
        let prompts = fields.get(&PROMPTS, mistakes);
        prompts.iter().for_each(|node| prompts::check(node, mistakes));
        TuneSection {
            prompts: prompts.as_ref().map(Prompts::of),
            nsamples: fields.value(&NSAMPLES, mistakes),
            steps: fields.value(&STEPS, mistakes),
            batch: fields.value(&BATCH, mistakes),
            learning_rate: fields.value(&LEARNING_RATE, mistakes),
            timestep_weighting: fields.value(&TIMESTEP_WEIGHTING, mistakes),
        }
    }
}
