//! The bound on the values of a predicted picture.

use serde_json::json;
use squeeze_base::error::Result;
use tch::Tensor;

use crate::checkpoint::ConfigFile;

/// `clip_sample` and `clip_sample_range`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Clip(Option<f64>);

impl Clip {
    /// Takes both keys; whether values are clipped by default depends on the class. Refuses
    /// `thresholding`, which is not implemented.
    pub(super) fn read(file: &mut ConfigFile, default: bool) -> Result<Self> {
        file.only("thresholding", &[json!(false)])?;
        Clip::read_without_thresholding(file, default)
    }

    /// As [`read`](Self::read), for a class that has no `thresholding`.
    pub(super) fn read_without_thresholding(file: &mut ConfigFile, default: bool) -> Result<Self> {
        let clips: bool = file.or("clip_sample", default)?;
        let range: f64 = file.or("clip_sample_range", 1.0)?;
        if clips && range <= 0.0 {
            return Err(file.error("clip_sample_range", format!("= {range} is not above 0")));
        }
        Ok(Clip(clips.then_some(range)))
    }

    /// Whether there is a bound.
    pub(super) fn is_on(self) -> bool {
        self.0.is_some()
    }

    /// The picture with its values within the bound.
    pub(super) fn apply(self, picture: Tensor) -> Result<Tensor> {
        Ok(match self.0 {
            Some(range) => picture.f_clamp(-range, range)?,
            None => picture,
        })
    }
}
