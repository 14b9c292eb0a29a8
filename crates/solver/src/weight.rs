//! Weights as the [o, d] matrices that the solver works on.

use squeeze_base::error::{Error, Result};
use squeeze_numerics::finite::is_finite;
use tch::{Kind, Tensor};

use super::hessian::Hessian;

/// `weight` [o, ...] as fp32 [o, d] on its own device.
pub(super) fn flat(weight: &Tensor) -> Result<Tensor> {
    let [o, rest @ ..] = &weight.size()[..] else {
        return Err(Error::shape("the weight", [], "[o, d] or [o, c, kh, kw]"));
    };
    let d = rest.iter().product::<i64>();
    if rest.is_empty() || *o == 0 || d == 0 {
        return Err(Error::shape("the weight", weight.size(), "[o, d] or [o, c, kh, kw], none of them 0,"));
    }
    let flat = weight.f_detach()?.f_reshape([*o, d])?.f_to_kind(Kind::Float)?;
    if !is_finite(&flat)? {
        return Err(Error::NotFinite("the weight has NaN or infinite values in it".into()));
    }
    Ok(flat)
}

/// [`flat`] on the Hessian's device, with a shape that fits it.
pub(super) fn flat_for(weight: &Tensor, hessian: &Hessian) -> Result<Tensor> {
    let flat = flat(weight)?;
    let (o, d) = flat.size2()?;
    let (dimension, groups) = (hessian.dimension(), hessian.groups());
    if d != dimension || o % groups != 0 {
        let of = if groups == 1 { String::new() } else { format!(" for each of {groups} groups") };
        return Err(Error::shape("the weight", weight.size(), format!("one for a Hessian of {dimension} inputs{of}")));
    }
    Ok(flat.f_to_device(hessian.device())?)
}
