//! The bound on the values of a predicted picture.

use squeeze_base::error::Result;
use tch::Tensor;

use super::threshold::Threshold;
use crate::checkpoint::ConfigFile;

/// `clip_sample` and `clip_sample_range`, or `thresholding` and its keys.
#[derive(Debug, Clone, Copy)]
pub(super) enum Clip {
    /// No bound.
    Off,
    /// A fixed bound.
    Range(f64),
    /// A bound for each picture.
    Dynamic(Threshold),
}

impl Clip {
    /// Takes all keys; whether values are clipped by default depends on the class. As in diffusers,
    /// thresholding takes the place of the fixed bound.
    pub(super) fn read(file: &mut ConfigFile, default: bool) -> Result<Self> {
        let threshold = Threshold::read(file)?;
        let clip = Clip::read_without_thresholding(file, default)?;
        Ok(threshold.map_or(clip, Clip::Dynamic))
    }

    /// As [`read`](Self::read), for a class that has no `thresholding`.
    pub(super) fn read_without_thresholding(file: &mut ConfigFile, default: bool) -> Result<Self> {
        let clips: bool = file.or("clip_sample", default)?;
        let range: f64 = file.or("clip_sample_range", 1.0)?;
        if clips && range <= 0.0 {
            return Err(file.error("clip_sample_range", format!("= {range} is not above 0")));
        }
        Ok(if clips { Clip::Range(range) } else { Clip::Off })
    }

    /// Whether there is a bound that also holds for values without one.
    pub(super) fn is_on(self) -> bool {
        matches!(self, Clip::Range(_))
    }

    /// The picture with its values within the bound.
    pub(super) fn apply(self, picture: Tensor) -> Result<Tensor> {
        match self {
            Clip::Off => Ok(picture),
            Clip::Range(range) => Ok(picture.f_clamp(-range, range)?),
            Clip::Dynamic(threshold) => threshold.apply(&picture),
        }
    }
}
