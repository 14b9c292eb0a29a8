//! The training timesteps that a sampler visits (table 2 of Lin et al. 2023, arXiv:2305.08891).

use std::str::FromStr;

use serde::{Deserialize, Serialize};
use squeeze_base::error::{Error, Result};
use squeeze_base::shorten::shorten;

use crate::checkpoint::ConfigFile;

/// `timestep_spacing`: which of the training timesteps a sampler visits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SpacingKind {
    /// Evenly, with both ends.
    Linspace,
    /// Multiples of a whole stride, counted from the clean end.
    Leading,
    /// Multiples of a fractional stride, counted from the noisy end.
    Trailing,
}

impl SpacingKind {
    /// The name in a config.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            SpacingKind::Linspace => "linspace",
            SpacingKind::Leading => "leading",
            SpacingKind::Trailing => "trailing",
        }
    }
}

impl FromStr for SpacingKind {
    type Err = Error;

    /// # Errors
    /// [`Error::Argument`] with the known names.
    fn from_str(name: &str) -> Result<Self> {
        let all = [SpacingKind::Leading, SpacingKind::Trailing, SpacingKind::Linspace];
        let known = || all.map(SpacingKind::name).join(", ");
        let found = all.into_iter().find(|kind| kind.name() == name);
        found.ok_or_else(|| Error::Argument(format!("unknown timestep spacing `{}` (known: {})", shorten(name), known())))
    }
}

/// `timestep_spacing` and `steps_offset`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Spacing {
    pub kind: SpacingKind,
    /// Added to the timesteps of leading spacing only.
    pub offset: usize,
}

impl Spacing {
    /// Takes both keys; the spacing's default depends on the class.
    pub(super) fn read(file: &mut ConfigFile, default: SpacingKind) -> Result<Self> {
        let offset: u32 = file.or("steps_offset", 0)?;
        Ok(Spacing { kind: file.or("timestep_spacing", default)?, offset: offset as usize })
    }

    /// The timesteps of Euler and DDIM, noisiest first. Linspace timesteps are not rounded.
    pub(super) fn timesteps(&self, train: usize, steps: usize) -> Vec<f64> {
        match self.kind {
            SpacingKind::Linspace => reversed(linspace(0.0, (train - 1) as f64, steps)),
            SpacingKind::Leading => (0..steps).rev().map(|i| (i * (train / steps) + self.offset) as f64).collect(),
            SpacingKind::Trailing => countdown(train, train, steps),
        }
    }

    /// [`timesteps`](Self::timesteps) rounded to whole numbers, for samplers that look them up in a
    /// table.
    ///
    /// # Errors
    /// [`Error::Argument`] if the rounding leads out of the table, which diffusers then reads from
    /// its wrong end.
    pub(super) fn whole_timesteps(&self, train: usize, steps: usize) -> Result<Vec<usize>> {
        let whole = |timestep: f64| {
            let timestep = timestep.round_ties_even();
            if (0.0..train as f64).contains(&timestep) {
                return Ok(timestep as usize);
            }
            Err(Error::Argument(format!(
                "{steps} steps of {train} spaced this way reach timestep {timestep}, which does not exist; take one more or less"
            )))
        };
        self.timesteps(train, steps).into_iter().map(whole).collect()
    }
}

/// `numpy.linspace`.
pub(super) fn linspace(start: f64, stop: f64, count: usize) -> Vec<f64> {
    let step = (stop - start) / (count.max(2) - 1) as f64;
    let mut values: Vec<f64> = (0..count).map(|i| i as f64 * step + start).collect();
    if let (Some(last), true) = (values.last_mut(), count > 1) {
        *last = stop;
    }
    values
}

/// Trailing spacing from `from`, in strides of `train / steps`: `round(numpy.arange(from, 0,
/// -stride)) - 1`.
///
/// `arange` gives ⌈from / stride⌉ values. By floating-point rounding this number is sometimes one
/// more than `steps`, and the last timestep is then -1. The increment of `arange` is the difference
/// of its first two values.
pub(super) fn countdown(from: usize, train: usize, steps: usize) -> Vec<f64> {
    let (from, stride) = (from as f64, train as f64 / steps as f64);
    let increment = (from - stride) - from;
    let count = (from / stride).ceil() as usize;
    (0..count).map(|i| (from + i as f64 * increment).round_ties_even() - 1.0).collect()
}

/// The values in reverse order.
pub(super) fn reversed(mut values: Vec<f64>) -> Vec<f64> {
    values.reverse();
    values
}
