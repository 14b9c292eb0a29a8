//! `weight.bin`: MIL blob storage, version 2.
//!
//! A header, then records at multiples of 64 bytes: 64 bytes that describe the data, and the data.
//! Follows coremltools' `mlmodel/src/MILBlob/Blob/StorageFormat.hpp` and `StorageWriter.cpp`.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};
use squeeze_base::allocator;
use squeeze_base::error::{Error, Result};

use super::element::ArrayType;

/// Header, record and alignment: each 64 bytes.
pub(super) const UNIT: u64 = 64;
/// The first bytes of each record.
pub(super) const SENTINEL: u32 = 0xDEAD_BEEF;
/// The storage's version.
pub(super) const VERSION: u32 = 2;

/// Writes blobs one after the other; nothing is kept.
#[derive(Debug)]
pub(super) struct BlobWriter {
    path: PathBuf,
    file: BufWriter<File>,
    hash: Sha256,
    count: u32,
    length: u64,
    /// The bytes that were pushed since freed memory was given back.
    since: usize,
    /// The offsets of the records so far by a hash of name, type and content, if records are
    /// shared.
    shared: Option<BTreeMap<String, u64>>,
}

/// A finished blob file.
#[derive(Debug, Clone)]
pub(super) struct BlobFile {
    /// Its length.
    pub bytes: u64,
    /// SHA-256 of everything after the header, in hex.
    pub sha256: String,
}

impl BlobWriter {
    /// Begins the file `path`.
    ///
    /// # Errors
    /// [`Error::Write`].
    pub(crate) fn create(path: &Path) -> Result<Self> {
        let file = File::create_new(path).map_err(Error::write(path))?;
        let mut file = BufWriter::with_capacity(1 << 20, file);
        // The count is not known yet.
        file.write_all(&[0; UNIT as usize]).map_err(Error::write(path))?;
        Ok(BlobWriter { path: path.to_owned(), file, hash: Sha256::new(), count: 0, length: UNIT, since: 0, shared: None })
    }

    /// Makes later records of equal name, type and content one record. The functions of a program
    /// call equal constants by equal names.
    pub(crate) fn share(&mut self) {
        self.shared.get_or_insert_default();
    }

    /// Adds the elements of an array, packed as [`squeeze_container::Packed`] packs
    /// them, and returns the record's offset: that of an earlier record if records are
    /// [shared](Self::share).
    ///
    /// # Errors
    /// [`Error::Internal`] if the bytes are not the array's, or no blob has its dtype;
    /// [`Error::Write`].
    pub(crate) fn push(&mut self, name: &str, array: &ArrayType, data: &[u8]) -> Result<u64> {
        /// The allocator keeps freed tensors, between which operations of the program come to lie,
        /// so that larger tensors do not fit into their places.
        const KEPT: usize = 256 << 20;
        self.since += data.len();
        if self.since >= KEPT {
            self.since = 0;
            allocator::give_back();
        }
        if self.shared.is_none() {
            return self.record(array, data);
        }
        let mut hash = Sha256::new();
        hash.update(format!("{name}\0{array}\0"));
        hash.update(data);
        let key = squeeze_base::digest::hex(hash);
        if let Some(offset) = self.shared.as_ref().and_then(|shared| shared.get(&key)) {
            return Ok(*offset);
        }
        let offset = self.record(array, data)?;
        self.shared.get_or_insert_default().insert(key, offset);
        Ok(offset)
    }

    fn record(&mut self, array: &ArrayType, data: &[u8]) -> Result<u64> {
        let wrong = || Error::internal(format!("{} bytes are not those of an array {array}", data.len()));
        let (code, numel) = (array.element.blob_code().ok_or_else(wrong)?, array.numel().ok_or_else(wrong)?);
        if array.bytes() != Some(data.len() as u64) {
            return Err(wrong());
        }
        let offset = self.length.next_multiple_of(UNIT);
        self.write(&[0; UNIT as usize][..(offset - self.length) as usize])?;
        let unused_bits = (8 - (numel % 8) * array.element.bits() % 8) % 8;
        let mut record = [0; UNIT as usize];
        record[0..4].copy_from_slice(&SENTINEL.to_le_bytes());
        record[4..8].copy_from_slice(&code.to_le_bytes());
        record[8..16].copy_from_slice(&(data.len() as u64).to_le_bytes());
        record[16..24].copy_from_slice(&(offset + UNIT).to_le_bytes());
        record[24..32].copy_from_slice(&unused_bits.to_le_bytes());
        self.write(&record)?;
        self.write(data)?;
        self.count += 1;
        Ok(offset)
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.hash.update(bytes);
        self.length += bytes.len() as u64;
        self.file.write_all(bytes).map_err(Error::write(&self.path))
    }

    /// Writes the header.
    ///
    /// # Errors
    /// [`Error::Write`].
    pub(crate) fn finish(mut self) -> Result<BlobFile> {
        let mut header = || -> std::io::Result<()> {
            self.file.flush()?;
            let file = self.file.get_mut();
            file.seek(SeekFrom::Start(0))?;
            file.write_all(&self.count.to_le_bytes())?;
            file.write_all(&VERSION.to_le_bytes())
        };
        header().map_err(Error::write(&self.path))?;
        Ok(BlobFile { bytes: self.length, sha256: squeeze_base::digest::hex(self.hash) })
    }
}

#[cfg(test)]
mod tests {
    use half::f16;
    use squeeze_codebook::BitWidth;
    use squeeze_container::Packed;

    use super::super::element::Element;
    use super::*;

    /// The golden file has these numbers from Apple's own writer (`tests/golden/make_coreml.py`).
    #[test]
    fn bytes_are_those_of_coremltools() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("weight.bin");
        let mut writer = BlobWriter::create(&path).unwrap();
        for bits in BitWidth::ALL {
            let lengths: &[usize] = if bits == BitWidth::Eight { &[21] } else { &[16, 21] };
            for length in lengths {
                let values = (0..*length).map(|i| ((i * i * i + i / 2 + usize::from(bits.bits())) % bits.entries()) as u8);
                let packed = Packed::pack(&values.collect::<Vec<_>>(), bits).unwrap();
                writer.push("x", &ArrayType::new(Element::Unsigned(bits), [*length as u64]), packed.bytes()).unwrap();
            }
        }
        let numbers = (0..21).map(|i| i as f32 / 4.0 - 2.0);
        let halves: Vec<u8> = numbers.clone().flat_map(|value| f16::from_f32(value).to_le_bytes()).collect();
        writer.push("x", &ArrayType::new(Element::F16, [3, 7]), &halves).unwrap();
        let floats: Vec<u8> = numbers.flat_map(f32::to_le_bytes).collect();
        let at = writer.push("x", &ArrayType::new(Element::F32, [21]), &floats).unwrap();
        let file = writer.finish().unwrap();
        let golden = include_bytes!("../../../tests/golden/coreml/blobs.bin");
        let ours = std::fs::read(&path).unwrap();
        assert_eq!(ours, golden);
        assert_eq!((file.bytes, at % UNIT), (golden.len() as u64, 0));
        assert_eq!(file.sha256, squeeze_base::digest::of_bytes(&golden[64..]));
    }

    /// Records are shared if asked for, and only those of equal name, type and content.
    #[test]
    fn equal_records_are_shared_on_request() {
        let folder = tempfile::tempdir().unwrap();
        let mut writer = BlobWriter::create(&folder.path().join("weight.bin")).unwrap();
        let halves = ArrayType::new(Element::F16, [2]);
        let first = writer.push("a", &halves, &[0; 4]).unwrap();
        assert_ne!(writer.push("a", &halves, &[0; 4]).unwrap(), first);
        writer.share();
        let shared = writer.push("a", &halves, &[0; 4]).unwrap();
        assert_eq!(writer.push("a", &halves, &[0; 4]).unwrap(), shared);
        let others = [
            writer.push("b", &halves, &[0; 4]).unwrap(),
            writer.push("a", &ArrayType::new(Element::F32, [1]), &[0; 4]).unwrap(),
            writer.push("a", &halves, &[1; 4]).unwrap(),
        ];
        assert!(others.iter().all(|offset| *offset > shared) && others.is_sorted_by(|a, b| a < b), "{others:?}");
        assert_eq!(writer.push("b", &halves, &[0; 4]).unwrap(), others[0]);
    }

    #[test]
    fn other_bytes_than_the_arrays_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let mut writer = BlobWriter::create(&folder.path().join("weight.bin")).unwrap();
        let bits = |length: u64| ArrayType::new(Element::Unsigned(BitWidth::Three), [length]);
        assert!(writer.push("x", &bits(11), &[0; 4]).is_err());
        assert!(writer.push("x", &bits(11), &[0; 5]).is_ok());
        assert!(writer.push("x", &ArrayType::new(Element::Bool, [8]), &[0; 8]).is_err());
        assert!(writer.push("x", &ArrayType::new(Element::F16, [1 << 40, 1 << 40]), &[]).is_err());
    }
}
