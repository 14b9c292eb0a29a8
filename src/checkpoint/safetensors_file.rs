//! One safetensors file, mapped.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use memmap2::{Mmap, UncheckedAdvice};
use safetensors::{Dtype, SafeTensors};
use tch::{Kind, Tensor};

use crate::device::Placement;
use crate::error::{Error, Result};

/// Where a tensor lies in its file.
#[derive(Debug, Clone)]
pub struct Entry {
    /// Its dtype in the file.
    pub dtype: Dtype,
    /// Its shape.
    pub shape: Vec<i64>,
    start: usize,
    end: usize,
}

impl Entry {
    /// The bytes of its data.
    pub fn bytes(&self) -> u64 {
        (self.end - self.start) as u64
    }

    /// Where its data begins, in bytes from the file's beginning.
    pub fn start(&self) -> u64 {
        self.start as u64
    }
}

/// A safetensors file whose header has been read and checked, and whose data is read from the map when asked for.
#[derive(Debug)]
pub struct SafetensorsFile {
    path: PathBuf,
    map: Mmap,
    entries: BTreeMap<String, Entry>,
    metadata: BTreeMap<String, String>,
}

impl SafetensorsFile {
    /// Maps `path` and checks its header: sizes, offsets, dtypes, that the data covers the file exactly.
    ///
    /// # Errors
    /// [`Error::Read`], or [`Error::BadFile`] saying what is wrong with it.
    pub fn open(path: &Path) -> Result<Self> {
        let file = crate::input::open(path)?;
        // SAFETY: the map is read only, and private to this value. That the file is not cut short while it is mapped is the one thing
        // that nobody can promise; a model that is overwritten under a running program ends it with SIGBUS, as in every reader that maps.
        let map = unsafe { Mmap::map(&file) }.map_err(Error::read(path))?;
        let (header, parsed) = SafeTensors::read_metadata(&map)
            .map_err(|why| Error::bad_file(path, format!("not a whole safetensors file: {why} ({} bytes)", map.len())))?;
        let data = 8 + header;
        let entries = parsed
            .tensors()
            .into_iter()
            .map(|(name, info)| {
                let shape = info.shape.iter().map(|n| *n as i64).collect();
                let (start, end) = info.data_offsets;
                (name, Entry { dtype: info.dtype, shape, start: data + start, end: data + end })
            })
            .collect();
        let metadata = parsed.metadata().iter().flatten().map(|(key, value)| (key.clone(), value.clone())).collect();
        Ok(SafetensorsFile { path: path.to_owned(), map, entries, metadata })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The tensors by name.
    pub fn entries(&self) -> &BTreeMap<String, Entry> {
        &self.entries
    }

    /// The header's `__metadata__`.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// Reads a tensor, converts it and puts it in its place. The file's pages are given back afterwards, so that what stays in memory
    /// is the tensor alone.
    ///
    /// # Errors
    /// [`Error::Tensors`] if it is not there or is not of a floating-point type that is read (F64, F32, F16, BF16).
    pub fn tensor(&self, name: &str, placement: Placement) -> Result<Tensor> {
        let wrong = |problem: String| Error::Tensors { path: self.path.clone(), problem };
        let entry = self.entries.get(name).ok_or_else(|| wrong(format!("tensor `{name}` is missing")))?;
        let kind = float_kind(entry.dtype)
            .ok_or_else(|| wrong(format!("tensor `{name}` is {:?}; weights are read as F32, F16 or BF16", entry.dtype)))?;
        let stored = Tensor::f_from_data_size(&self.map[entry.start..entry.end], &entry.shape, kind)?;
        // To the device before the conversion: fp16 is half the way.
        let tensor = stored.f_to_device(placement.device)?.f_to_kind(placement.kind)?;
        self.release(entry);
        Ok(tensor)
    }

    /// The bytes of a tensor. The file's pages are given back, as by [`tensor`](Self::tensor).
    pub fn read(&self, name: &str) -> Option<Vec<u8>> {
        let entry = self.entries.get(name)?;
        let bytes = self.map.get(entry.start..entry.end)?.to_vec();
        self.release(entry);
        Some(bytes)
    }

    /// Tells the system that a tensor's pages are not needed any more; they can be read again.
    fn release(&self, entry: &Entry) {
        let length = entry.end - entry.start;
        // SAFETY: DontNeed on a read-only map of a file only drops clean pages; the next access reads the same bytes from the file.
        let released = unsafe { self.map.unchecked_advise_range(UncheckedAdvice::DontNeed, entry.start, length) };
        if let Err(why) = released {
            tracing::debug!("{}: pages not released: {why}", self.path.display());
        }
    }
}

/// The dtypes that weights come in.
pub(super) fn float_kind(dtype: Dtype) -> Option<Kind> {
    match dtype {
        Dtype::F64 => Some(Kind::Double),
        Dtype::F32 => Some(Kind::Float),
        Dtype::F16 => Some(Kind::Half),
        Dtype::BF16 => Some(Kind::BFloat16),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tensor_reads_the_same_after_its_pages_were_released() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.safetensors");
        let values: Vec<u8> = (0..40_000u32).flat_map(|i| (i as f32).to_le_bytes()).collect();
        let view = safetensors::tensor::TensorView::new(Dtype::F32, vec![200, 200], &values).unwrap();
        safetensors::serialize_to_file([("x", view)], None, &path).unwrap();
        let file = SafetensorsFile::open(&path).unwrap();
        let first = file.tensor("x", Placement::CPU).unwrap();
        let second = file.tensor("x", Placement::CPU).unwrap();
        assert_eq!(first, second);
        assert_eq!(second.double_value(&[199, 199]), 39_999.0);
    }
}
