//! Safetensors files as bytes, without libtorch.

mod header;
mod magnitudes;

use std::collections::BTreeMap;
use std::path::Path;

pub use header::Header;
pub use magnitudes::Magnitudes;
use safetensors::Dtype;
use safetensors::tensor::Metadata;
use sha2::{Digest, Sha256};

use crate::digest;
use crate::error::{Error, Result};
use crate::input::{START, SteadyFile, other_format};

/// A tensor's type and place in its file.
#[derive(Debug, Clone)]
pub struct Entry {
    /// Its dtype in the file.
    pub dtype: Dtype,
    /// Its shape.
    pub shape: Vec<i64>,
    start: u64,
    end: u64,
}

impl Entry {
    /// The bytes of its data.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.end - self.start
    }

    /// The part `index` of `parts` equal parts along the first dimension, whose data is a stretch
    /// of this entry's; `None` if the dimension cannot be divided so.
    #[must_use]
    pub fn part(&self, index: usize, parts: usize) -> Option<Entry> {
        let (first, rest) = self.shape.split_first()?;
        let rows = usize::try_from(*first).ok()?;
        if index >= parts || !rows.is_multiple_of(parts) || !self.bytes().is_multiple_of(parts as u64) {
            return None;
        }
        let bytes = self.bytes() / parts as u64;
        let start = self.start + bytes * index as u64;
        let shape = [&[(rows / parts) as i64], rest].concat();
        Some(Entry { dtype: self.dtype, shape, start, end: start + bytes })
    }

    /// Where its data begins, in bytes from the file's beginning.
    #[must_use]
    pub fn start(&self) -> u64 {
        self.start
    }
}

/// A safetensors file whose header has been read and checked, and whose data is read when asked
/// for.
///
/// The file stays open. Once another program writes to it or shortens it, it is refused with
/// [`Error::Changed`]; a file that is replaced by another of its name is still read in its old
/// form.
#[derive(Debug)]
pub struct SafetensorsFile {
    file: SteadyFile,
    entries: BTreeMap<String, Entry>,
    metadata: BTreeMap<String, String>,
}

/// The longest header that the safetensors library reads.
const MAX_HEADER: u64 = 100_000_000;
/// The bytes of the header's length, which comes first.
const PREFIX: u64 = 8;

impl SafetensorsFile {
    /// Opens `path` and checks its header: sizes, offsets, dtypes, that the data covers the file
    /// exactly.
    ///
    /// # Errors
    /// [`Error::Read`], or [`Error::BadFile`] naming the problem.
    pub fn open(path: &Path) -> Result<Self> {
        let file = SteadyFile::open(path)?;
        let bytes = file.bytes();
        let mut start = vec![0; bytes.min(START as u64) as usize];
        file.read(&mut start, 0)?;
        let wrong = |why: String| match other_format(&start) {
            Some(problem) => Error::bad_file(path, problem),
            None => Error::bad_file(path, format!("not a whole safetensors file: {why} ({bytes} bytes)")),
        };
        if bytes < PREFIX {
            return Err(wrong("it is too short for a header".into()));
        }
        let mut length = [0; PREFIX as usize];
        file.read(&mut length, 0)?;
        let length = u64::from_le_bytes(length);
        if length > MAX_HEADER || length > bytes - PREFIX {
            return Err(wrong(format!("its header is said to have {length} bytes")));
        }
        let mut header = vec![0; length as usize];
        file.read(&mut header, PREFIX)?;
        let parsed: Metadata = serde_json::from_slice(&header).map_err(|why| wrong(format!("its header is invalid: {why}")))?;
        let data = PREFIX + length;
        let mut entries = BTreeMap::new();
        for (name, info) in parsed.tensors() {
            let shape = info.shape.iter().map(|n| i64::try_from(*n)).collect::<Result<_, _>>();
            let shape: Vec<i64> = shape.map_err(|_| wrong(format!("`{name}` is of shape {:?}", info.shape)))?;
            // The library accepts any dimensions beside a 0; here they can be multiplied in any
            // order.
            if shape.iter().try_fold(1i64, |product, n| product.checked_mul((*n).max(1))).is_none() {
                return Err(wrong(format!("`{name}` is of shape {shape:?}")));
            }
            // The library has checked that offsets follow each other, from 0 on; whether they lie
            // in the file is seen below.
            let (start, end) = info.data_offsets;
            let [start, end] = [start, end].map(|offset| data.saturating_add(offset as u64));
            entries.insert(name, Entry { dtype: info.dtype, shape, start, end });
        }
        let end = entries.values().map(|entry| entry.end).max().unwrap_or(data);
        if end != bytes {
            return Err(wrong(format!("its tensors end at {end}")));
        }
        let metadata = parsed.metadata().iter().flatten().map(|(key, value)| (key.clone(), value.clone())).collect();
        Ok(SafetensorsFile { file, entries, metadata })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// Its length.
    pub fn bytes(&self) -> u64 {
        self.file.bytes()
    }

    /// The tensors by name.
    pub fn entries(&self) -> &BTreeMap<String, Entry> {
        &self.entries
    }

    /// The header's `__metadata__`.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// Fills `bytes` with the data of `entry`, which is one of this file's; both have one length.
    ///
    /// # Errors
    /// [`Error::Changed`]; [`Error::Read`].
    pub fn read_into(&self, entry: &Entry, bytes: &mut [u8]) -> Result<()> {
        self.file.read(bytes, entry.start)
    }

    /// The bytes of a tensor.
    ///
    /// # Errors
    /// [`Error::Tensors`] if it is not there; [`Error::Changed`]; [`Error::Read`].
    pub fn read(&self, name: &str) -> Result<Vec<u8>> {
        let missing = || Error::Tensors { path: self.path().to_owned(), problem: format!("tensor `{name}` is missing") };
        let entry = self.entries.get(name).ok_or_else(missing)?;
        let mut bytes = vec![0; entry.bytes() as usize];
        self.file.read(&mut bytes, entry.start)?;
        Ok(bytes)
    }

    /// SHA-256 of the whole file, in hex. The file is read once.
    ///
    /// # Errors
    /// [`Error::Changed`]; [`Error::Read`].
    pub fn sha256(&self) -> Result<String> {
        self.file.sha256()
    }

    /// SHA-256 of all bytes after the header, in hex, and their number.
    ///
    /// # Errors
    /// As [`sha256`](Self::sha256).
    pub fn data_sha256(&self) -> Result<(String, u64)> {
        let start = self.data_start();
        let mut hash = Sha256::new();
        self.file.for_each_block(start..self.bytes(), |block| hash.update(block))?;
        Ok((digest::hex(hash), self.bytes() - start))
    }

    /// Reads the whole file once, for its hash, if that is not known yet, and for the magnitudes of
    /// its floating-point tensors.
    ///
    /// # Errors
    /// As [`sha256`](Self::sha256).
    pub fn survey(&self) -> Result<(String, BTreeMap<&str, Magnitudes>)> {
        if let Some(known) = self.file.known_sha256() {
            return Ok((known.to_owned(), self.magnitudes(&mut |_| {})?));
        }
        // A thread of its own hashes, while this one reads and looks for the largest values.
        let (sha256, magnitudes) = std::thread::scope(|scope| {
            let (send, blocks) = std::sync::mpsc::sync_channel::<Vec<u8>>(2);
            let hasher = scope.spawn(move || {
                let mut hash = Sha256::new();
                blocks.iter().for_each(|block| hash.update(&block));
                digest::hex(hash)
            });
            // The hasher receives until `send` is dropped.
            let magnitudes = self.magnitudes(&mut |block| drop(send.send(block.to_vec())));
            drop(send);
            (hasher.join(), magnitudes)
        });
        // The hash of a file that could not be read to its end is none.
        let magnitudes = magnitudes?;
        let sha256 = sha256.map_err(|_| Error::internal("the thread that hashes a file has panicked"))?;
        Ok((self.file.learn(sha256), magnitudes))
    }

    /// The magnitudes of the floating-point tensors. The file is read from beginning to end, and
    /// `on_block` is given all of it, block by block.
    fn magnitudes(&self, on_block: &mut dyn FnMut(&[u8])) -> Result<BTreeMap<&str, Magnitudes>> {
        self.file.for_each_block(0..self.data_start(), &mut *on_block)?;
        let mut in_order: Vec<(&String, &Entry)> = self.entries.iter().collect();
        in_order.sort_by_key(|(_, entry)| (entry.start, entry.end));
        let mut all = BTreeMap::new();
        // Together the tensors are all of the data, without gaps.
        for (name, entry) in in_order {
            let mut magnitudes = Magnitudes::new(entry.dtype);
            self.file.for_each_block(entry.start..entry.end, |block| {
                on_block(block);
                magnitudes.iter_mut().for_each(|magnitudes| magnitudes.add(block));
            })?;
            all.extend(magnitudes.map(|magnitudes| (name.as_str(), magnitudes)));
        }
        Ok(all)
    }

    /// Checks that the file was not changed since it was opened. Every read checks too.
    ///
    /// # Errors
    /// [`Error::Changed`]; [`Error::Read`].
    pub fn check_unchanged(&self) -> Result<()> {
        self.file.check()
    }

    /// Where the header ends.
    fn data_start(&self) -> u64 {
        self.entries.values().map(|entry| entry.start).min().unwrap_or(self.bytes())
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

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
    fn what_is_read_is_what_lies_there() {
        let folder = tempfile::tempdir().unwrap();
        let values: Vec<u8> = (0..40_000u32).flat_map(|i| (i as f32).to_le_bytes()).collect();
        let halves: Vec<u8> = (0..6).flat_map(|i| half::f16::from_f32(i as f32 / 4.0).to_le_bytes()).collect();
        let path = written(
            folder.path(),
            &[
                ("x", Dtype::F32, vec![200, 200], values.clone()),
                ("h", Dtype::F16, vec![2, 3], halves),
                ("none", Dtype::F32, vec![0, 3], vec![]),
                ("ids", Dtype::I64, vec![1], vec![1; 8]),
            ],
        );
        let file = SafetensorsFile::open(&path).unwrap();
        assert_eq!(file.read("x").unwrap(), values);
        assert!(file.read("y").unwrap_err().to_string().contains("`y` is missing"));

        let whole = std::fs::read(&path).unwrap();
        let (hash, magnitudes) = file.survey().unwrap();
        assert_eq!((hash, file.sha256().unwrap()), (digest::of_bytes(&whole), digest::of_bytes(&whole)));
        assert_eq!(magnitudes.keys().copied().collect::<Vec<_>>(), ["h", "none", "x"]);
        assert_eq!((magnitudes["x"].largest(), magnitudes["h"].largest()), (39_999.0, 1.25));
        let start = whole.len() - (values.len() + 12 + 8);
        assert_eq!(file.data_sha256().unwrap(), (digest::of_bytes(&whole[start..]), (whole.len() - start) as u64));
    }

    /// Files that other writers make, and some that nobody should: what the safetensors library
    /// reads is read to the same bytes, and what it refuses is refused.
    #[test]
    fn odd_files_are_read_as_the_safetensors_library_reads_them() {
        const A: &str = r#""a":{"dtype":"F16","shape":[2],"data_offsets":[0,4]}"#;
        const B: &str = r#""b":{"dtype":"U8","shape":[3],"data_offsets":[4,7]}"#;
        let of = |entries: &[&str]| format!("{{{}}}", entries.join(","));
        let cases = [
            ("as usual", of(&[A, B]), true),
            ("another order than that of the data", of(&[B, A]), true),
            ("blanks after the header", format!("{}   ", of(&[A, B])), true),
            ("line ends in the header", of(&[A, B]).replace(',', ",\n"), true),
            ("an odd length", format!("{} ", of(&[A, B])), true),
            ("metadata of nothing", of(&[r#""__metadata__":{}"#, A, B]), true),
            ("metadata of null", of(&[r#""__metadata__":null"#, A, B]), true),
            ("metadata of text", of(&[r#""__metadata__":{"format":"pt","ü":""}"#, A, B]), true),
            ("metadata of a number", of(&[r#""__metadata__":{"step":3}"#, A, B]), false),
            ("a scalar", of(&[A, B, r#""c":{"dtype":"U8","shape":[],"data_offsets":[7,8]}"#]), true),
            ("no elements", of(&[A, B, r#""c":{"dtype":"F32","shape":[0,3],"data_offsets":[7,7]}"#]), true),
            ("names that are escaped", of(&[A, B]).replace("\"b\"", r#""\u0062 \ud83d\ude00""#), true),
            ("a name of nothing", of(&[A, B]).replace("\"b\"", "\"\""), true),
            ("a key that nobody knows", of(&[A, B]).replace("\"shape\":[3]", "\"shape\":[3],\"of\":1"), true),
            ("no tensors", "{}".to_owned(), true),
            ("a byte-order mark", format!("\u{feff}{}", of(&[A, B])), false),
            ("sizes with a point", of(&[A, B]).replace("[3]", "[3.0]"), false),
            ("a dtype in small letters", of(&[A, B]).replace("F16", "f16"), false),
        ];
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.safetensors");
        let data: Vec<u8> = (1..=8).collect();
        for (what, header, is_good) in cases {
            // As many bytes of data as the header has places for.
            let ends = [(",8]", 8), (",7]", 7)].into_iter().find(|(end, _)| header.replace('\n', "").contains(end));
            let data = &data[..ends.map_or(0, |(_, end)| end)];
            let whole = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), data].concat();
            std::fs::write(&path, &whole).unwrap();
            let theirs = safetensors::SafeTensors::deserialize(&whole);
            let ours = SafetensorsFile::open(&path);
            let ends = (theirs.is_ok(), ours.is_ok());
            assert_eq!(ends, (is_good, is_good), "{what}");
            let (Ok(theirs), Ok(ours)) = (theirs, ours) else { continue };
            let names: Vec<String> = theirs.tensors().into_iter().map(|(name, _)| name).collect();
            assert_eq!(names.len(), ours.entries().len(), "{what}");
            for name in names {
                let view = theirs.tensor(&name).unwrap();
                let entry = &ours.entries()[&name];
                let shape: Vec<usize> = entry.shape.iter().map(|size| *size as usize).collect();
                assert_eq!((entry.dtype, &shape[..]), (view.dtype(), view.shape()), "{what}: {name}");
                assert_eq!(ours.read(&name).unwrap(), view.data(), "{what}: {name}");
            }
        }
    }

    #[test]
    fn headers_are_not_believed() {
        let folder = tempfile::tempdir().unwrap();
        let path = written(folder.path(), &[("x", Dtype::F32, vec![2], vec![0; 8])]);
        let whole = std::fs::read(&path).unwrap();
        let long = |length: u64| [&length.to_le_bytes()[..], &whole[8..]].concat();
        let huge = br#"{"x":{"dtype":"F32","shape":[4611686018427387904],"data_offsets":[0,18446744073709551615]}}"#;
        let cases = [
            (vec![], "too short"),
            (whole[..7].to_vec(), "too short"),
            (whole[..8].to_vec(), "header is said to have"),
            (whole[..whole.len() - 1].to_vec(), "tensors end at"),
            ([&whole[..], &[0]].concat(), "tensors end at"),
            (long(u64::MAX), "header is said to have"),
            (long(MAX_HEADER + 1), "header is said to have"),
            (long(1), "header is invalid"),
            ([&(huge.len() as u64).to_le_bytes()[..], huge].concat(), "header is invalid"),
        ];
        for (bytes, expected) in cases {
            std::fs::write(&path, &bytes).unwrap();
            let said = SafetensorsFile::open(&path).unwrap_err().to_string();
            assert!(said.contains("not a whole safetensors file") && said.contains(expected), "{said}");
        }
    }
}
