//! Tensors from the bytes of files, and the bytes of tensors.

use std::borrow::Cow;

use half::f16;
use safetensors::{Dtype, View};
use squeeze_base::error::{Error, Result};
use squeeze_base::safetensors_file::{Entry, Magnitudes, SafetensorsFile};
use squeeze_numerics::device::Placement;
use tch::{Device, Kind, Tensor};

/// Reads a tensor of `file`, converts it and puts it on the device of `placement`.
///
/// # Errors
/// [`Error::Tensors`] if it is missing, is not of a floating-point type that is read (F64, F32,
/// F16, BF16), or has a value that is NaN, infinite or beyond the dtype of `placement`;
/// [`Error::Changed`]; [`Error::Read`].
pub fn read_tensor(file: &SafetensorsFile, name: &str, placement: Placement) -> Result<Tensor> {
    let problem = format!("tensor `{name}` is missing");
    let missing = || Error::Tensors { path: file.path().to_owned(), problem };
    read_entry(file, name, file.entries().get(name).ok_or_else(missing)?, placement)
}

/// As [`read_tensor`], for an entry of `file` or a part of one; `name` is for errors.
pub(super) fn read_entry(file: &SafetensorsFile, name: &str, entry: &Entry, placement: Placement) -> Result<Tensor> {
    let wrong = |problem: String| Error::Tensors { path: file.path().to_owned(), problem };
    let (Some(kind), Some(mut magnitudes)) = (float_kind(entry.dtype), Magnitudes::new(entry.dtype)) else {
        return Err(wrong(format!("tensor `{name}` is {:?}; weights are read as F32, F16 or BF16", entry.dtype)));
    };
    let stored = stored(file, entry, kind, &mut magnitudes)?;
    if let Some(dtype) = float_dtype(placement.kind) {
        magnitudes.check(dtype).map_err(|problem| wrong(format!("`{name}` {problem}")))?;
    }
    // The tensor is moved before it is converted: an fp16 tensor has half the bytes to copy.
    Ok(stored.f_to_device(placement.device)?.f_to_kind(placement.kind)?)
}

/// Reads the data of `entry` straight into a tensor of its own dtype, without a second copy.
fn stored(file: &SafetensorsFile, entry: &Entry, kind: Kind, magnitudes: &mut Magnitudes) -> Result<Tensor> {
    // Zeros, because a reader must not be given uninitialized memory.
    let tensor = Tensor::f_zeros(&entry.shape, (kind, Device::Cpu))?;
    let length = tensor.numel() * kind.elt_size_in_bytes();
    if length as u64 != entry.bytes() {
        let problem = format!("a tensor of {} bytes for {length} bytes of {:?}", entry.bytes(), entry.shape);
        return Err(Error::bad_file(file.path(), problem));
    }
    if length > 0 {
        // SAFETY: the tensor was made above, on the CPU and contiguous, and has `length` bytes, all
        // written. Nothing else knows of it until this function returns, when the slice is gone.
        // Every pattern of bits is a value of a floating-point dtype.
        let bytes = unsafe { std::slice::from_raw_parts_mut(tensor.data_ptr().cast::<u8>(), length) };
        file.read_into(entry, bytes)?;
        magnitudes.add(bytes);
    }
    Ok(tensor)
}

/// libtorch's kind for a floating-point dtype in which weights are stored; `None` for other dtypes.
pub(super) fn float_kind(dtype: Dtype) -> Option<Kind> {
    match dtype {
        Dtype::F64 => Some(Kind::Double),
        Dtype::F32 => Some(Kind::Float),
        Dtype::F16 => Some(Kind::Half),
        Dtype::BF16 => Some(Kind::BFloat16),
        _ => None,
    }
}

/// The safetensors dtype for libtorch's `kind`: the inverse of [`float_kind`].
fn float_dtype(kind: Kind) -> Option<Dtype> {
    match kind {
        Kind::Double => Some(Dtype::F64),
        Kind::Float => Some(Dtype::F32),
        Kind::Half => Some(Dtype::F16),
        Kind::BFloat16 => Some(Dtype::BF16),
        _ => None,
    }
}

/// The elements of a tensor in row-major order, as the bytes of a safetensors file.
#[derive(Debug)]
pub struct TensorBytes {
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

impl TensorBytes {
    /// Copies the elements of a floating-point tensor.
    ///
    /// # Errors
    /// [`Error::Argument`] if its dtype is another; [`Error::Torch`].
    pub fn of(tensor: &Tensor) -> Result<Self> {
        let kind = tensor.f_kind()?;
        let dtype = float_dtype(kind).ok_or_else(|| Error::Argument(format!("a tensor of {kind:?} is not written")))?;
        let tensor = tensor.f_detach()?.f_to_device(Device::Cpu)?.f_contiguous()?;
        let mut bytes = vec![0; tensor.numel() * kind.elt_size_in_bytes()];
        tensor.f_copy_data_u8(&mut bytes, tensor.numel())?;
        let shape = tensor.size().into_iter().map(|n| n as usize).collect();
        Ok(TensorBytes { dtype, shape, bytes })
    }

    /// The bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}

impl View for TensorBytes {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(&self.bytes)
    }

    fn data_len(&self) -> usize {
        self.bytes.len()
    }
}

/// The elements of a tensor in row-major order, rounded to fp16.
///
/// # Errors
/// [`Error::Torch`].
pub fn halves(tensor: &Tensor) -> Result<Vec<f16>> {
    let flat = tensor.f_detach()?.f_to_device(Device::Cpu)?.f_to_kind(Kind::Half)?.f_contiguous()?.f_view([-1])?;
    Ok(Vec::try_from(&flat)?)
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};

    use safetensors::tensor::TensorView;

    use super::*;

    fn written(folder: &Path, tensors: &[(&str, Dtype, Vec<usize>, Vec<u8>)]) -> PathBuf {
        let path = folder.join("x.safetensors");
        let views =
            tensors.iter().map(|(name, dtype, shape, bytes)| (*name, TensorView::new(*dtype, shape.clone(), bytes).unwrap()));
        safetensors::serialize_to_file(views, None, &path).unwrap();
        path
    }

    #[test]
    fn tensors_have_the_values_of_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let values: Vec<u8> = (0..40_000u32).flat_map(|i| (i as f32).to_le_bytes()).collect();
        let quarters: Vec<u8> = (0..6).flat_map(|i| f16::from_f32(i as f32 / 4.0).to_le_bytes()).collect();
        let path = written(
            folder.path(),
            &[
                ("x", Dtype::F32, vec![200, 200], values),
                ("h", Dtype::F16, vec![2, 3], quarters),
                ("none", Dtype::F32, vec![0, 3], vec![]),
                ("ids", Dtype::I64, vec![1], vec![1; 8]),
            ],
        );
        let file = SafetensorsFile::open(&path).unwrap();
        let first = read_tensor(&file, "x", Placement::CPU).unwrap();
        assert_eq!(first, read_tensor(&file, "x", Placement::CPU).unwrap());
        assert_eq!((first.size(), first.double_value(&[199, 199])), (vec![200, 200], 39_999.0));
        assert_eq!(read_tensor(&file, "h", Placement::CPU).unwrap().double_value(&[1, 2]), 1.25);
        assert_eq!(read_tensor(&file, "none", Placement::CPU).unwrap().size(), [0, 3]);
        assert!(read_tensor(&file, "ids", Placement::CPU).unwrap_err().to_string().contains("`ids` is I64"));
        assert!(read_tensor(&file, "y", Placement::CPU).unwrap_err().to_string().contains("`y` is missing"));
    }

    #[test]
    fn values_that_are_no_numbers_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let bytes = |values: &[f32]| values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<_>>();
        let path = written(
            folder.path(),
            &[
                ("bad", Dtype::F32, vec![3], bytes(&[1.0, 2.0, f32::NAN])),
                ("large", Dtype::F32, vec![2], bytes(&[1.0, -70_000.0])),
            ],
        );
        let file = SafetensorsFile::open(&path).unwrap();
        let refused = |name, kind| {
            let why = read_tensor(&file, name, Placement { device: Device::Cpu, kind }).unwrap_err();
            assert!(why.is_bad_input());
            why.to_string()
        };
        assert!(refused("bad", Kind::Float).contains("`bad` has NaN or infinite values (first at index 2)"));
        assert!(refused("large", Kind::Half).contains("`large` has values of up to 7e4, but fp16 ends at 65504"));
        assert_eq!(read_tensor(&file, "large", Placement::CPU).unwrap().double_value(&[1]), -70_000.0);
    }

    #[test]
    fn bytes_written_are_bytes_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.safetensors");
        for kind in [Kind::Double, Kind::Float, Kind::Half, Kind::BFloat16] {
            // Not contiguous.
            let tensor = Tensor::arange(6, (kind, Device::Cpu)).view([2, 3]).transpose(0, 1);
            let bytes = TensorBytes::of(&tensor).unwrap();
            assert_eq!(bytes.bytes().len(), 6 * kind.elt_size_in_bytes());
            safetensors::serialize_to_file([("x", bytes)], None, &path).unwrap();
            let file = SafetensorsFile::open(&path).unwrap();
            assert_eq!(read_tensor(&file, "x", Placement { device: Device::Cpu, kind }).unwrap(), tensor);
            assert_eq!(halves(&tensor).unwrap(), [0.0, 3.0, 1.0, 4.0, 2.0, 5.0].map(f16::from_f32));
        }
        assert!(TensorBytes::of(&Tensor::from_slice(&[1i64])).is_err());
    }
}
