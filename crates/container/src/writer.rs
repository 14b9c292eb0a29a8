//! Writes a container piece by piece.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use half::f16;
use safetensors::Dtype;
use serde_json::Value;
use squeeze_base::digest;
use squeeze_base::error::{Error, Result};
use squeeze_base::output::{parent, write_file};
use squeeze_base::safetensors_file::Header;
use squeeze_codebook::Codebook;
use tempfile::SpooledTempFile;

use super::half_bytes;
use super::metadata::{ContainerInfo, Metadata, Part, WeightRow, table_hash};
use super::reader::Container;
use super::weight::{CompressedWeight, Values};

/// A container under construction. Weights and tensors are added one at a time and need not be kept
/// by the caller. The file appears, whole, when [`finish`](Self::finish) returns, or not at all.
///
/// A safetensors file begins with the places of all tensors, and fp16 data must come before bytes
/// to be aligned. Until `finish`, the data is therefore kept in memory, up to 40 MiB of each of the
/// two, and beyond that in unnamed temporary files beside `path`. Equal calls in equal order give
/// equal bytes.
#[derive(Debug)]
pub struct ContainerWriter {
    path: PathBuf,
    info: ContainerInfo,
    weights: BTreeMap<String, WeightRow>,
    names: BTreeSet<String>,
    halves: Section,
    bytes: Section,
}

/// The sizes of a written container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Written {
    /// The file's length.
    pub bytes: u64,
    /// The bytes of tensors; the rest is the header with names and metadata.
    pub payload_bytes: u64,
}

/// Bytes of a section that are kept in memory; a longer one is kept in a file.
const IN_MEMORY: usize = 40 << 20;

/// Data of one dtype, in the order in which it came.
#[derive(Debug)]
struct Section {
    dtype: Dtype,
    file: BufWriter<SpooledTempFile>,
    tensors: Vec<(String, Vec<i64>, u64)>,
    length: u64,
}

impl Section {
    fn new(dtype: Dtype, folder: &Path) -> Self {
        let file = BufWriter::with_capacity(1 << 20, tempfile::spooled_tempfile_in(IN_MEMORY, folder));
        Section { dtype, file, tensors: Vec::new(), length: 0 }
    }

    fn push(&mut self, name: String, shape: Vec<i64>, bytes: &[u8]) -> std::io::Result<()> {
        self.file.write_all(bytes)?;
        self.length += bytes.len() as u64;
        self.tensors.push((name, shape, bytes.len() as u64));
        Ok(())
    }

    /// The data from its beginning.
    fn rewound(&mut self) -> std::io::Result<impl Read> {
        self.file.flush()?;
        let file = self.file.get_mut();
        file.seek(SeekFrom::Start(0))?;
        Ok(file)
    }
}

impl ContainerWriter {
    /// Begins the container that will be `path`.
    ///
    /// # Errors
    /// [`Error::Write`] if its folder cannot be written.
    pub fn create(path: &Path, info: ContainerInfo) -> Result<Self> {
        // Sections are files only once they are long, but that there can be none is said at once.
        tempfile::tempfile_in(parent(path)).map_err(Error::write(path))?;
        Ok(ContainerWriter {
            info,
            weights: BTreeMap::new(),
            names: BTreeSet::new(),
            halves: Section::new(Dtype::F16, parent(path)),
            bytes: Section::new(Dtype::U8, parent(path)),
            path: path.to_owned(),
        })
    }

    /// Adds a compressed weight under its checkpoint name, which ends in `.weight`, with the
    /// compressor's `report`, such as its error; null for none.
    ///
    /// # Errors
    /// [`Error::Argument`] if there is such a name already, the weight's parts disagree, or it is
    /// neither pruned nor palettized; [`Error::NotFinite`]; [`Error::Write`].
    pub fn add_weight(&mut self, name: &str, weight: &CompressedWeight, report: Value) -> Result<()> {
        if weight.mask.is_none() && matches!(weight.values, Values::Plain(_)) {
            return Err(Error::Argument(format!("`{name}` is neither pruned nor palettized: add it as a tensor")));
        }
        let dense = weight.decode().map_err(Error::layer(name))?;
        let mut row = WeightRow {
            axis: None,
            bits: None,
            group_size: None,
            kept: weight.kept(),
            masked: weight.mask.is_some(),
            report,
            scale_block: None,
            scaled: false,
            sha256: half_bytes::sha256(&dense),
            shape: weight.shape.clone(),
            vector_length: Some(weight.vector_length()).filter(|length| *length > 1),
        };
        if let Values::Palettized { codebook, .. } = &weight.values {
            (row.bits, row.axis, row.group_size) = (Some(codebook.bits.bits()), Some(codebook.axis), Some(codebook.group_size));
            row.scaled = codebook.scales.is_some();
            row.scale_block = codebook.scales.as_ref().and_then(|scales| scales.block);
        }
        // No tensor has the weight's own name, so that a name means one thing.
        self.claim(name)?;
        for (part, dtype, shape) in row.parts().map_err(|problem| Error::internal(format!("`{name}`: {problem}")))? {
            let part_name = part.of(name);
            self.claim(&part_name)?;
            match (part, &weight.values) {
                (Part::Mask, _) => self.push(dtype, part_name, shape, weight.mask.as_ref().map_or(&[], |mask| mask.bytes()))?,
                (Part::Indices, Values::Palettized { indices, .. }) => self.push(dtype, part_name, shape, indices.bytes())?,
                (Part::Palettes, Values::Palettized { codebook, .. }) => {
                    self.push(dtype, part_name, shape, &half_bytes::to_bytes(&codebook.palettes))?;
                }
                (Part::Scales, Values::Palettized { codebook: Codebook { scales: Some(scales), .. }, .. }) => {
                    self.push(dtype, part_name, shape, &half_bytes::to_bytes(&scales.values))?;
                }
                (Part::Values, Values::Plain(values)) => self.push(dtype, part_name, shape, &half_bytes::to_bytes(values))?,
                _ => return Err(Error::internal(format!("`{name}` lacks its {part:?}"))),
            }
        }
        self.weights.insert(name.to_owned(), row);
        Ok(())
    }

    /// Adds the compressed weight `name` of another container as it is, with its hash, but with
    /// this `report`: the bytes of its parts are copied, and nothing is decoded.
    ///
    /// # Errors
    /// [`Error::BadFile`] if `from` has no such weight; [`Error::Changed`]; as
    /// [`add_weight`](Self::add_weight).
    pub fn copy_weight(&mut self, from: &Container, name: &str, report: Value) -> Result<()> {
        let row = WeightRow { report, ..from.row(name)?.clone() };
        self.claim(name)?;
        for (part, dtype, shape) in row.parts().map_err(|problem| Error::internal(format!("`{name}`: {problem}")))? {
            let part_name = part.of(name);
            self.claim(&part_name)?;
            let bytes = from.file().read(&part_name)?;
            self.push(dtype, part_name, shape, &bytes)?;
        }
        self.weights.insert(name.to_owned(), row);
        Ok(())
    }

    /// Adds an uncompressed tensor under its checkpoint name; `values` in row-major order.
    ///
    /// # Errors
    /// [`Error::Argument`] if there is such a name already or the number of values is not that of
    /// the shape; [`Error::NotFinite`] if a value is not a number, or was too large for fp16;
    /// [`Error::Write`].
    pub fn add_tensor(&mut self, name: &str, shape: &[i64], values: &[f16]) -> Result<()> {
        let numel = shape.iter().try_fold(1usize, |product, n| product.checked_mul(usize::try_from(*n).ok().filter(|n| *n > 0)?));
        if numel != Some(values.len()) {
            return Err(Error::shape(
                format!("`{name}`: the list of values"),
                [values.len() as i64],
                format!("that of a tensor of {shape:?}"),
            ));
        }
        if !values.iter().all(|value| value.is_finite()) {
            return Err(Error::NotFinite(format!("`{name}` has values that are not finite in fp16")));
        }
        self.claim(name)?;
        self.push(Dtype::F16, name.to_owned(), shape.to_vec(), &half_bytes::to_bytes(values))
    }

    /// Reserves a name. Each is used once, and none can be taken for a part of a weight that lacks
    /// that part.
    fn claim(&mut self, name: &str) -> Result<()> {
        if name.is_empty() || name == "__metadata__" {
            return Err(Error::Argument(format!("`{name}` cannot be a tensor's name")));
        }
        if !self.names.insert(name.to_owned()) {
            return Err(Error::State(format!("`{name}` was added to the container twice")));
        }
        Ok(())
    }

    fn push(&mut self, dtype: Dtype, name: String, shape: Vec<i64>, bytes: &[u8]) -> Result<()> {
        let section = if dtype == Dtype::F16 { &mut self.halves } else { &mut self.bytes };
        section.push(name, shape, bytes).map_err(Error::write(&self.path))
    }

    /// Writes the file.
    ///
    /// # Errors
    /// [`Error::Write`]; then there is no new file, and an old one is as it was.
    /// [`Error::Argument`] if the header is beyond what safetensors readers accept.
    pub fn finish(mut self) -> Result<Written> {
        if let Some(name) = self.names.iter().find(|name| self.stray(name)) {
            return Err(Error::Argument(format!("`{name}` would be taken for a part of a compressed weight")));
        }
        let path = self.path.clone();
        let payload_bytes = self.halves.length + self.bytes.length;
        let hash = |halves: &mut Section, bytes: &mut Section| {
            digest::of_reader(&mut halves.rewound()?.chain(bytes.rewound()?)).map(|(hash, _)| hash)
        };
        let data_sha256 = hash(&mut self.halves, &mut self.bytes).map_err(Error::write(&path))?;
        let tensors = places([&self.halves, &self.bytes]);
        let tensors_sha256 = table_hash(tensors.iter().copied());
        let version = Metadata::version_for(&self.weights);
        let metadata = Metadata { info: self.info, version, weights: self.weights, data_sha256, tensors_sha256 };
        let mut header = Header::new(&metadata.to_entries());
        for (name, dtype, shape, [start, end]) in tensors {
            header.push(name, dtype, shape, end - start);
        }
        let header = header.to_bytes()?;
        write_file(&path, |out| {
            out.write_all(&header)?;
            copy(&mut self.halves.rewound()?, out)?;
            copy(&mut self.bytes.rewound()?, out)
        })?;
        Ok(Written { bytes: header.len() as u64 + payload_bytes, payload_bytes })
    }

    /// Whether `name` looks like a part of a weight, but is not one.
    fn stray(&self, name: &str) -> bool {
        let Some((owner, row)) = Part::owner(name).and_then(|owner| Some((owner, self.weights.get(owner)?))) else {
            return false;
        };
        !row.parts().is_ok_and(|parts| parts.iter().any(|(part, ..)| part.of(owner) == name))
    }
}

/// Copies all of `from`, in blocks that are large enough for a disk.
fn copy(from: &mut dyn Read, to: &mut dyn Write) -> std::io::Result<()> {
    let mut buffer = vec![0; 1 << 20];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(count) => to.write_all(&buffer[..count])?,
            Err(why) if why.kind() == std::io::ErrorKind::Interrupted => {}
            Err(why) => return Err(why),
        }
    }
}

/// A tensor's name, dtype, shape, and the begin and end of its data.
type Place<'a> = (&'a str, Dtype, &'a [i64], [u64; 2]);

/// The place of each tensor in the data.
fn places<'a>(sections: [&'a Section; 2]) -> Vec<Place<'a>> {
    let mut end = 0;
    let tensors = sections.into_iter().flat_map(|section| section.tensors.iter().map(|tensor| (section.dtype, tensor)));
    tensors
        .map(|(dtype, (name, shape, length))| {
            let start = end;
            end += length;
            (name.as_str(), dtype, shape.as_slice(), [start, end])
        })
        .collect()
}
