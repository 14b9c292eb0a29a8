//! The check for NaN and infinity.

use squeeze_base::error::Result;
use tch::{Kind, Tensor};

/// Whether all elements of `tensor` are finite. If their sum is finite, so are they, and one pass
/// is enough.
pub fn is_finite(tensor: &Tensor) -> Result<bool> {
    if tensor.f_sum(Kind::Float)?.f_double_value(&[])?.is_finite() {
        return Ok(true);
    }
    // The sum of large finite numbers may overflow.
    Ok(tensor.f_isfinite()?.f_all()?.f_int64_value(&[])? != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_what_is_not_finite() {
        let finite = |numbers: &[f32], kind| is_finite(&Tensor::from_slice(numbers).to_kind(kind)).unwrap();
        for kind in [Kind::Float, Kind::Half, Kind::BFloat16, Kind::Double] {
            assert!(finite(&[], kind) && finite(&[1.0, -2.0, 0.0], kind));
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                assert!(!finite(&[1.0, bad, 2.0], kind), "{bad} as {kind:?}");
            }
            assert!(!finite(&[f32::INFINITY, f32::NEG_INFINITY], kind));
        }
        assert!(finite(&[f32::MAX; 9], Kind::Float), "finite numbers whose sum is not");
        assert!(finite(&[65504.0; 9], Kind::Half));
    }
}
