//! Copies of tensors on the host.

use squeeze_base::error::Result;
use tch::{Device, Tensor};

/// The elements in row-major order, on the host.
pub(super) fn on_host(tensor: &Tensor) -> Result<Tensor> {
    Ok(tensor.f_contiguous()?.f_to_device(Device::Cpu)?.f_flatten(0, -1)?)
}

/// The elements of a mask in row-major order.
pub(super) fn bools(keep: &Tensor) -> Result<Vec<bool>> {
    Ok(Vec::try_from(&on_host(keep)?)?)
}
