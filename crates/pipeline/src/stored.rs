//! Tensors as they are stored in a container.

use half::f16;
use squeeze_base::error::{Error, Result};
use squeeze_container::{CompressedWeight, Container};
use squeeze_numerics::device::Placement;
use tch::Tensor;

/// A tensor as it is stored.
#[derive(Debug)]
pub enum StoredTensor {
    /// Its values in row-major order.
    Dense(Vec<f16>),
    /// A pruned or palettized weight.
    Compressed(CompressedWeight),
}

impl StoredTensor {
    /// The tensor `name` of `container`, which must be of `shape`.
    ///
    /// # Errors
    /// [`Error::BadFile`] or [`Error::Tensors`] if it is missing, damaged or of another shape;
    /// [`Error::Read`]; [`Error::Changed`].
    pub(crate) fn of_container(container: &Container, name: &str, shape: &[i64]) -> Result<Self> {
        if let Some(stored) = container.shape(name).filter(|stored| *stored != shape) {
            let problem = format!("tensor `{name}` is {stored:?}, not {shape:?}");
            return Err(Error::Tensors { path: container.path().to_owned(), problem });
        }
        match container.has_weight(name) {
            true => Ok(StoredTensor::Compressed(container.weight(name)?)),
            false => Ok(StoredTensor::Dense(container.tensor(name)?)),
        }
    }
}

/// Values in row-major order as a tensor.
pub(crate) fn placed(values: &[f16], shape: &[i64], placement: Placement) -> Result<Tensor> {
    Ok(Tensor::f_from_slice(values)?.f_view(shape)?.f_to_device(placement.device)?.f_to_kind(placement.kind)?)
}
