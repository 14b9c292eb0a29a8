//! Calibration: the UNet's inputs on real trajectories.

mod calls;
mod draw;
mod feed;
mod file;
mod hold_out;
mod pictures;
mod record;
mod weighting;

pub use calls::Calls;
pub(crate) use draw::drawing_activations;
pub use draw::{
    calibrate, defaults, denoising_start, encoder_bytes, expected_calls, final_latents, hint, scheduler, settings, settings_for,
};
pub(crate) use hold_out::is_held_out;
pub(crate) use pictures::PicturesInTurn;
pub use record::{PromptSet, encode, finals, prompts_together, record};
use sdxl_model::unet::Conditioning;
use squeeze_base::error::Result;
use squeeze_numerics::device::Placement;
use tch::Tensor;
pub use weighting::weights;

/// One call of the UNet: all of its inputs.
#[derive(Debug)]
pub struct Sample {
    /// Scaled noisy latents [b, c, h, w]; b is 2 with guidance, the negative prompt's row first.
    pub sample: Tensor,
    /// The timestep, in training steps.
    pub timestep: f64,
    /// The text and size conditioning.
    pub conditioning: Conditioning,
}

impl Sample {
    /// The sample in another place (no copy is made if it is there already).
    ///
    /// # Errors
    /// If libtorch refuses, usually for want of memory.
    pub fn placed(&self, placement: Placement) -> Result<Sample> {
        let place = |tensor: &Tensor| -> Result<Tensor> { Ok(tensor.f_to_device(placement.device)?.f_to_kind(placement.kind)?) };
        Ok(Sample {
            sample: place(&self.sample)?,
            timestep: self.timestep,
            conditioning: Conditioning {
                encoder_hidden_states: place(&self.conditioning.encoder_hidden_states)?,
                text_embeds: place(&self.conditioning.text_embeds)?,
                time_ids: place(&self.conditioning.time_ids)?,
                timestep_cond: self.conditioning.timestep_cond.as_ref().map(place).transpose()?,
            },
        })
    }
}

/// Samples to calibrate with, all of the same shape.
#[derive(Debug, Default)]
pub struct Samples {
    /// The calls.
    pub calls: Vec<Sample>,
    /// Remarks: fewer samples than were asked for, for example.
    pub notes: Vec<String>,
}

impl Samples {
    /// Their number and shape; `None` if there are none.
    #[must_use]
    pub fn shape(&self) -> Option<Calls> {
        let first = self.calls.first()?;
        let [batch, _, height, width] = first.sample.size()[..] else { return None };
        let text = first.conditioning.encoder_hidden_states.size().get(1).copied()?;
        Some(Calls { count: self.calls.len(), batch, height, width, text })
    }
}

/// The choice of `wanted` calls out of `prompts` x `steps`: for each prompt its steps, in ascending
/// order.
///
/// Every prompt gets the same number of calls, give or take one. They are spread over all
/// timesteps, and shifted from prompt to prompt so that no timestep is favoured.
#[must_use]
pub fn spread(prompts: usize, steps: usize, wanted: usize) -> Vec<Vec<usize>> {
    let wanted = wanted.min(prompts * steps);
    (0..prompts)
        .map(|prompt| {
            // Bresenham: the shares add up to `wanted`.
            let share = (prompt + 1) * wanted / prompts - prompt * wanted / prompts;
            (0..share).map(|k| ((2 * prompts * k + 2 * prompt + 1) * steps) / (2 * prompts * share)).collect()
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_tutorials_numbers() {
        // Three prompts of 50 steps, 128 samples: 42 or 43 each, all different.
        let kept = spread(3, 50, 128);
        assert_eq!(kept.iter().map(Vec::len).collect::<Vec<_>>(), [42, 43, 43]);
        // One sample a prompt: the timesteps still cover the range.
        let kept = spread(16, 30, 16);
        let steps: Vec<usize> = kept.iter().map(|steps| steps[0]).collect();
        assert!(steps.windows(2).all(|pair| pair[0] < pair[1]) && steps[0] == 0 && steps[15] == 29, "{steps:?}");
    }

    proptest! {
        #[test]
        fn every_call_at_most_once_and_as_many_as_wanted(prompts in 1usize..40, steps in 1usize..60, wanted in 1usize..600) {
            let kept = spread(prompts, steps, wanted);
            let count: usize = kept.iter().map(Vec::len).sum();
            prop_assert_eq!(count, wanted.min(prompts * steps));
            for steps_kept in &kept {
                prop_assert!(steps_kept.windows(2).all(|pair| pair[0] < pair[1]));
                prop_assert!(steps_kept.iter().all(|step| *step < steps));
            }
            let shares: Vec<usize> = kept.iter().map(Vec::len).collect();
            prop_assert!(shares.iter().max().unwrap() - shares.iter().min().unwrap() <= 1);
        }
    }
}
