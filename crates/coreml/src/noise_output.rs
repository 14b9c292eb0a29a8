//! Programs whose output is noise, whatever their UNet predicts.

use squeeze_base::error::{Error, Result};

/// Apple's timesteps are fp16, which holds whole numbers up to this.
const MOST_TIMESTEPS: usize = 2048;

/// What a UNet predicts (diffusers' `prediction_type`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Predicted {
    /// The noise (`epsilon`).
    Noise,
    /// The velocity of Salimans & Ho 2022, √ᾱ·noise - √(1-ᾱ)·picture (`v_prediction`).
    Velocity,
    /// The picture without its noise (`sample`).
    Picture,
}

/// Makes a program's output noise, for samplers that take every output for noise and have a noise
/// schedule of their own, as those of Apple's Swift pipeline.
///
/// ᾱ is the share of the picture (as a variance) in the noisy latents √ᾱ·picture + √(1-ᾱ)·noise.
/// Latents must not be scaled, and timesteps must be whole numbers below the length of `signal`.
#[derive(Debug, Clone, PartialEq)]
pub struct NoiseOutput {
    /// What the UNet predicts.
    pub predicted: Predicted,
    /// ᾱ at each of the sampler's timesteps: above 0 and below 1.
    pub signal: Vec<f32>,
    /// For each of the sampler's timesteps the one at which the UNet was trained on this ᾱ; `None`
    /// if they are the same.
    pub timesteps: Option<Vec<f32>>,
}

impl NoiseOutput {
    /// Checks the tables.
    ///
    /// # Errors
    /// [`Error::Argument`] if they are of different lengths or of none, or have values that are out
    /// of range.
    pub(super) fn check(&self) -> Result<()> {
        let NoiseOutput { predicted: _, signal, timesteps } = self;
        let count = signal.len();
        if !(1..=MOST_TIMESTEPS).contains(&count) {
            let expected = format!("between 1 and {MOST_TIMESTEPS}");
            return Err(Error::range("the number of a sampler's timesteps", count, expected));
        }
        if let Some(value) = signal.iter().find(|value| !(**value > 0.0 && **value < 1.0)) {
            return Err(Error::Argument(format!("a share {value} of the picture in the noisy latents is not between 0 and 1")));
        }
        match timesteps {
            Some(timesteps) if timesteps.len() != count => {
                Err(Error::Argument(format!("{} timesteps of the UNet for {count} of the sampler", timesteps.len())))
            }
            Some(timesteps) if !timesteps.iter().all(|timestep| timestep.is_finite()) => {
                Err(Error::Argument("a timestep of the UNet is not finite".into()))
            }
            Some(_) | None => Ok(()),
        }
    }

    /// Whether the output is made of the UNet's prediction and the noisy latents. Else the
    /// prediction is noise, and only the timesteps are others.
    pub(super) fn converts(&self) -> bool {
        self.predicted != Predicted::Noise
    }

    /// Whether the program of a UNet, or of a chunk that begins or ends it, has a table: of the
    /// UNet's timesteps, which the input block reads, or for the conversion, which follows the
    /// output block.
    pub(super) fn is_made_in(&self, begins: bool, ends: bool) -> bool {
        (begins && self.timesteps.is_some()) || (ends && self.converts())
    }

    /// A value for each of the sampler's timesteps, from its ᾱ.
    pub(super) fn table(&self, value: impl Fn(f64) -> f64) -> Vec<f32> {
        self.signal.iter().map(|signal| value(f64::from(*signal)) as f32).collect()
    }
}
