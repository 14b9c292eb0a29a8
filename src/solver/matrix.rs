//! Between weights and the [o, d] matrices that the solver works on.

use tch::{Kind, Tensor};

use super::Hessian;
use crate::error::{Error, Result};
use crate::finite::is_finite;

/// `weight` [o, ...] as fp32 [o, d] on its own device.
pub(super) fn flat(weight: &Tensor) -> Result<Tensor> {
    let [o, rest @ ..] = &weight.size()[..] else {
        return Err(Error::Argument("a single number is no weight".into()));
    };
    let d = rest.iter().product::<i64>();
    if rest.is_empty() || *o == 0 || d == 0 {
        return Err(Error::Argument(format!("a weight {:?} is no matrix", weight.size())));
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
        return Err(Error::Argument(format!("a weight {:?} does not fit a Hessian of {dimension} inputs{of}", weight.size())));
    }
    Ok(flat.f_to_device(hessian.device())?)
}

/// A copy with its own memory.
pub(super) fn copy(tensor: &Tensor) -> Result<Tensor> {
    let mut copy = tensor.f_zeros_like()?;
    copy.f_copy_(tensor)?;
    Ok(copy)
}

/// The numbers of an fp32 tensor in row-major order.
pub(super) fn to_vec(tensor: &Tensor) -> Result<Vec<f32>> {
    let tensor = tensor.f_to_device(tch::Device::Cpu)?.f_contiguous()?;
    let mut values = vec![0.0; tensor.numel()];
    tensor.f_copy_data(&mut values, tensor.numel())?;
    Ok(values)
}

/// `tensor[rows, columns]`, a view.
pub(super) fn block(tensor: &Tensor, rows: std::ops::Range<i64>, columns: std::ops::Range<i64>) -> Result<Tensor> {
    Ok(tensor.f_narrow(0, rows.start, rows.end - rows.start)?.f_narrow(1, columns.start, columns.end - columns.start)?)
}

/// The parts of `0..length` of `size` each; the last may be shorter.
pub(super) fn panels(length: i64, size: i64) -> impl Iterator<Item = std::ops::Range<i64>> {
    let size = size.max(1);
    (0..length).step_by(size.unsigned_abs() as usize).map(move |start| start..length.min(start + size))
}
