//! The check for NaN and infinity.

use squeeze_base::error::Result;
use tch::{Device, Kind, Tensor};

/// Whether all elements of `tensor` are finite. If their sum is finite, so are they, and one pass
/// is enough.
pub fn is_finite(tensor: &Tensor) -> Result<bool> {
    if tensor.f_sum(Kind::Float)?.f_double_value(&[])?.is_finite() {
        return Ok(true);
    }
    // The sum of large finite numbers may overflow.
    Ok(tensor.f_isfinite()?.f_all()?.f_int64_value(&[])? != 0)
}

/// Whether all elements of all `tensors`, which are on one device, are finite. A GPU is waited for
/// once.
///
/// # Errors
/// If libtorch refuses.
pub fn are_finite<'a>(tensors: impl IntoIterator<Item = &'a Tensor>) -> Result<bool> {
    let tensors: Vec<&Tensor> = tensors.into_iter().collect();
    let each = || tensors.iter().try_fold(true, |all, tensor| Ok(all && is_finite(tensor)?));
    match tensors.first() {
        Some(first) if first.device() != Device::Cpu => {
            let sums = tensors.iter().map(|tensor| Ok(tensor.f_sum(Kind::Float)?)).collect::<Result<Vec<_>>>()?;
            if is_finite(&Tensor::f_stack(&sums, 0)?)? { Ok(true) } else { each() }
        }
        Some(_) | None => each(),
    }
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
        let numbers = |last: f32| [Tensor::from_slice(&[1.0_f32, 2.0]), Tensor::from_slice(&[last])];
        assert!(are_finite(&numbers(3.0)).unwrap() && !are_finite(&numbers(f32::NAN)).unwrap() && are_finite(&[]).unwrap());
        assert!(finite(&[f32::MAX; 9], Kind::Float), "finite numbers whose sum is not");
        assert!(finite(&[65504.0; 9], Kind::Half));
    }
}
