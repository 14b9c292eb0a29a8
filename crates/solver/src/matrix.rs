//! Parts, copies and numbers of matrices.

use squeeze_base::error::{Error, Result};
use tch::{Kind, Tensor};

/// A copy in new memory.
pub(super) fn copy(tensor: &Tensor) -> Result<Tensor> {
    let mut copy = tensor.f_empty_like()?;
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

/// The ranges of length `size` that `0..length` is cut into; the last one may be shorter.
pub(super) fn panels(length: i64, size: i64) -> impl Iterator<Item = std::ops::Range<i64>> {
    let size = size.max(1);
    (0..length).step_by(size.unsigned_abs() as usize).map(move |start| start..length.min(start + size))
}

/// The elements of a tensor as a slice of its memory.
///
/// # Errors
/// [`Error::Internal`] unless it is a contiguous fp32 tensor on the CPU.
pub(super) fn numbers(tensor: &Tensor) -> Result<&[f32]> {
    check_plain(tensor)?;
    if tensor.numel() == 0 {
        return Ok(&[]);
    }
    // SAFETY: a contiguous fp32 tensor on the CPU has `numel` neighbouring f32 from `data_ptr` on,
    // all initialized, and the slice borrows the tensor for as long as it lives. Callers hand in
    // tensors that share their memory with no other.
    Ok(unsafe { std::slice::from_raw_parts(tensor.data_ptr().cast_const().cast(), tensor.numel()) })
}

/// The elements of a tensor as a mutable slice of its memory.
///
/// # Errors
/// As [`numbers`].
pub(super) fn numbers_mut(tensor: &mut Tensor) -> Result<&mut [f32]> {
    check_plain(tensor)?;
    if tensor.numel() == 0 {
        return Ok(&mut []);
    }
    // SAFETY: as in `numbers`; and the tensor is borrowed mutably.
    Ok(unsafe { std::slice::from_raw_parts_mut(tensor.data_ptr().cast(), tensor.numel()) })
}

fn check_plain(tensor: &Tensor) -> Result<()> {
    if tensor.device() == tch::Device::Cpu && tensor.f_kind()? == Kind::Float && tensor.is_contiguous() {
        return Ok(());
    }
    Err(Error::internal("only a contiguous fp32 tensor on the CPU can be read as a slice"))
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;

    #[test]
    fn numbers_are_written_through_a_slice() {
        let mut tensor = Tensor::zeros([3, 4], (Kind::Float, Device::Cpu));
        for (at, number) in numbers_mut(&mut tensor).unwrap().iter_mut().enumerate() {
            *number = at as f32;
        }
        assert_eq!(numbers(&tensor).unwrap(), to_vec(&tensor).unwrap());
        assert_eq!(to_vec(&tensor).unwrap(), (0..12).map(|at| at as f32).collect::<Vec<_>>());
        assert!(numbers_mut(&mut tensor.tr()).is_err() && numbers(&tensor.tr()).is_err());
        assert!(numbers_mut(&mut tensor.to_kind(Kind::Half)).is_err());
        assert!(numbers_mut(&mut Tensor::zeros([0, 4], (Kind::Float, Device::Cpu))).unwrap().is_empty());
    }
}
