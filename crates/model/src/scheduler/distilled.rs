//! What LCM and TCD have in common: timesteps that are some of those the model was distilled at.

use squeeze_base::error::{Error, Result};

use super::Prediction;
use super::noise::NoiseSchedule;
use crate::checkpoint::ConfigFile;

/// The keys and tables of both classes.
#[derive(Debug)]
pub(super) struct Distilled {
    pub prediction: Prediction,
    /// The timesteps visited, noisiest first.
    pub timesteps: Vec<f64>,
    /// ᾱ of every training timestep.
    pub table: Vec<f32>,
}

impl Distilled {
    /// Takes the keys. Both classes have `set_alpha_to_one`, `timestep_spacing` and `steps_offset`
    /// too, but in diffusers these change nothing. `clips` says whether predicted pictures are
    /// bounded.
    pub(super) fn read(file: &mut ConfigFile, noise: &NoiseSchedule, steps: usize, clips: bool) -> Result<Self> {
        let prediction = file.or("prediction_type", Prediction::Epsilon)?;
        let original: usize = file.or("original_inference_steps", 50)?;
        if !(1..=noise.len()).contains(&original) {
            let problem = format!("= {original} is not between 1 and the {} training timesteps", noise.len());
            return Err(file.error("original_inference_steps", problem));
        }
        if steps > original {
            return Err(Error::Argument(format!(
                "cannot take {steps} steps: the sampler has timesteps for 1 to {original} (`original_inference_steps`)"
            )));
        }
        let table = noise.signal()?;
        let stride = noise.len() / original;
        // As `numpy.linspace(0, original, steps, endpoint=False)`.
        let skip = original as f64 / steps as f64;
        let index = |step: usize| (step as f64 * skip).floor() as usize;
        let timesteps: Vec<usize> = (0..steps).map(|step| (original - index(step)) * stride - 1).collect();
        if let (Prediction::Epsilon, Some(&first)) = (prediction, timesteps.first())
            && table[first] <= 0.0
            && !clips
        {
            let problem = "= epsilon cannot be sampled from a timestep that is pure noise (rescale_betas_zero_snr)";
            return Err(file.error("prediction_type", problem));
        }
        Ok(Distilled { prediction, timesteps: timesteps.into_iter().map(|timestep| timestep as f64).collect(), table })
    }

    /// ᾱ at step `index`.
    pub(super) fn signal(&self, index: usize) -> f32 {
        self.table[self.timesteps[index] as usize]
    }

    /// Whether `index` is the last step.
    pub(super) fn is_last(&self, index: usize) -> bool {
        index + 1 == self.timesteps.len()
    }
}
