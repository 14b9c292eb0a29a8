//! Dynamic thresholding of a predicted picture (Saharia et al. 2022, arXiv:2205.11487, section
//! 2.3; diffusers' `_threshold_sample`).

use squeeze_base::error::Result;
use tch::{Kind, Tensor};

use crate::checkpoint::ConfigFile;

/// `thresholding`, `dynamic_thresholding_ratio` and `sample_max_value`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Threshold {
    /// The share of a picture's values that stay within the bound.
    ratio: f64,
    /// The largest bound; the least is 1.
    max: f64,
}

impl Threshold {
    /// Takes the three keys; `None` if pictures are not thresholded.
    pub(super) fn read(file: &mut ConfigFile) -> Result<Option<Self>> {
        let is_on: bool = file.or("thresholding", false)?;
        let ratio: f64 = file.or("dynamic_thresholding_ratio", 0.995)?;
        let max: f64 = file.or("sample_max_value", 1.0)?;
        if is_on && !(0.0..=1.0).contains(&ratio) {
            return Err(file.error("dynamic_thresholding_ratio", format!("= {ratio} is not between 0 and 1")));
        }
        if is_on && !(max >= 1.0 && max.is_finite()) {
            return Err(file.error("sample_max_value", format!("= {max} is not a number of at least 1")));
        }
        Ok(is_on.then_some(Threshold { ratio, max }))
    }

    /// The picture [n, c, h, w] with the values of each row within its bound, divided by it.
    pub(super) fn apply(self, picture: &Tensor) -> Result<Tensor> {
        let kind = picture.f_kind()?;
        // libtorch has no quantiles of half precision.
        let wide = if kind == Kind::Double { picture.shallow_clone() } else { picture.f_to_kind(Kind::Float)? };
        let rows = wide.f_flatten(1, -1)?;
        let bound = rows.f_abs()?.f_quantile_scalar(self.ratio, 1, true, "linear")?.f_clamp(1.0, self.max)?;
        let within = rows.f_clamp_tensor(Some(&bound.f_neg()?), Some(&bound))?.f_div(&bound)?;
        Ok(within.f_view(picture.size().as_slice())?.f_to_kind(kind)?)
    }
}
