//! Reads a container.

use std::collections::BTreeMap;
use std::path::Path;

use half::f16;
use safetensors::Dtype;
use serde::Serialize;
use serde_json::Value;
use squeeze_base::error::{Error, Result};
use squeeze_base::safetensors_file::{Magnitudes, SafetensorsFile};
use squeeze_codebook::{BitWidth, Codebook, Scales};

use super::half_bytes;
use super::metadata::{ContainerInfo, FORMAT, Metadata, Part, WeightRow, table_hash};
use super::packed::{Mask, Packed};
use super::weight::{CompressedWeight, Values, numel};

/// A container whose header, and usually data, has been checked. The data stays in the file until
/// it is asked for.
#[derive(Debug)]
pub struct Container {
    file: SafetensorsFile,
    metadata: Metadata,
}

/// Whether the file `path` says that it is a container. A file that is none may be a checkpoint.
#[must_use]
pub fn is_container(path: &Path) -> bool {
    let is_ours = |file: SafetensorsFile| file.metadata().get("format").is_some_and(|format| format == FORMAT);
    SafetensorsFile::open(path).is_ok_and(is_ours)
}

/// How a compressed weight is stored.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct StoredLayer {
    /// The weight's checkpoint name, with `.weight`.
    pub name: String,
    /// The dense weight's shape.
    pub shape: Vec<i64>,
    /// The width of a palette index; absent if the weight is only pruned.
    pub bits: Option<u8>,
    /// The axis whose channels are grouped, if palettized.
    pub axis: Option<usize>,
    /// Channels in a group, if palettized.
    pub group_size: Option<usize>,
    /// Neighbouring output channels that share an index, if palettized: 1 unless the palettes are
    /// of vectors.
    pub vector_length: Option<usize>,
    /// Whether palette entries are multiplied by scales.
    pub scaled: bool,
    /// Columns that share a scale, if an output channel has several.
    pub scale_block: Option<usize>,
    /// Elements that are kept.
    pub kept: u64,
    /// The pruned elements' share, 0 to 1.
    pub sparsity: f64,
    /// Stored bits for each element, kept and pruned.
    pub bits_per_weight: f64,
    /// The bytes of all parts.
    pub bytes: u64,
    /// The compressor's report; null if there is none.
    pub report: Value,
}

impl Container {
    /// Opens `path`, checks its header, and reads the file once to check the hash of its data.
    ///
    /// # Errors
    /// As [`open_unverified`](Self::open_unverified); [`Error::BadFile`] naming the weights that
    /// are damaged.
    pub fn open(path: &Path) -> Result<Self> {
        let container = Self::open_unverified(path)?;
        container.check_data()?;
        Ok(container)
    }

    /// Opens `path` and checks its header: version, metadata, and the parts of every compressed
    /// weight with their dtypes and sizes. The hash of the data is not checked;
    /// [`open`](Self::open) checks it, at the cost of reading the whole file.
    ///
    /// # Errors
    /// [`Error::Read`], or [`Error::BadFile`] naming the problems and their weights.
    pub fn open_unverified(path: &Path) -> Result<Self> {
        let file = SafetensorsFile::open(path)?;
        let metadata = Metadata::from_entries(path, file.metadata())?;
        let container = Container { file, metadata };
        container.check_parts()?;
        container.check_table()?;
        Ok(container)
    }

    /// Checks that the file has exactly the parts that the metadata names, and otherwise only fp16
    /// tensors.
    fn check_parts(&self) -> Result<()> {
        let mut problems = Vec::new();
        let mut rest: BTreeMap<&str, _> = self.file.entries().iter().map(|(name, entry)| (name.as_str(), entry)).collect();
        for (name, row) in &self.metadata.weights {
            let parts = row.parts().unwrap_or_else(|problem| {
                problems.push(format!("`{name}` {problem}"));
                Vec::new()
            });
            for (part, dtype, shape) in parts {
                let part = part.of(name);
                match rest.remove(part.as_str()) {
                    None => problems.push(format!("`{part}` is missing")),
                    Some(entry) if entry.dtype != dtype || entry.shape != shape => {
                        let (have, is) = (entry.dtype, &entry.shape);
                        problems.push(format!("`{part}` is {have} {is:?}, but must be {dtype} {shape:?}"));
                    }
                    Some(_) => {}
                }
            }
        }
        for (name, entry) in rest {
            let weights = &self.metadata.weights;
            if weights.contains_key(name) || Part::owner(name).is_some_and(|owner| weights.contains_key(owner)) {
                problems.push(format!("`{name}` does not belong there"));
            } else if entry.dtype != Dtype::F16 {
                problems.push(format!("`{name}` is {}; tensors that are no part of a compressed weight are F16", entry.dtype));
            } else if entry.shape.iter().any(|n| *n <= 0) {
                problems.push(format!("`{name}` is of shape {:?}", entry.shape));
            }
        }
        self.no_problems(problems)
    }

    /// Checks the hash of the table of tensors. This check comes last, because the others name the
    /// damage more precisely.
    fn check_table(&self) -> Result<()> {
        let entries = self.file.entries().iter();
        let places = entries.map(|(name, entry)| {
            let place = [entry.start(), entry.start() + entry.bytes()];
            (name.as_str(), entry.dtype, entry.shape.as_slice(), place)
        });
        if table_hash(places) != self.metadata.tensors_sha256 {
            let problem = "the table of tensors is damaged: it does not have the hash that `tensors_sha256` says";
            return Err(Error::bad_file(self.path(), problem));
        }
        Ok(())
    }

    /// An error that lists the first of `problems`, if there are any.
    pub(super) fn no_problems(&self, problems: Vec<String>) -> Result<()> {
        const SHOWN: usize = 4;
        if problems.is_empty() {
            return Ok(());
        }
        let more = if problems.len() > SHOWN { format!("; and {} more", problems.len() - SHOWN) } else { String::new() };
        let shown: Vec<&str> = problems.iter().take(SHOWN).map(String::as_str).collect();
        Err(Error::bad_file(self.path(), format!("{}{more}", shown.join("; "))))
    }

    /// The file.
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// The container's own metadata: architecture, recipe, sources.
    pub fn info(&self) -> &ContainerInfo {
        &self.metadata.info
    }

    /// The compressed weights by name.
    pub fn layers(&self) -> impl ExactSizeIterator<Item = StoredLayer> {
        self.metadata.weights.iter().map(|(name, row)| self.layer(name, row))
    }

    fn layer(&self, name: &str, row: &WeightRow) -> StoredLayer {
        let parts = row.parts().expect("the parts were checked when the container was opened");
        let bytes = parts.iter().map(|(part, ..)| self.file.entries()[&part.of(name)].bytes()).sum();
        let numel = numel(&row.shape).expect("the shape was checked when the container was opened") as f64;
        StoredLayer {
            name: name.to_owned(),
            shape: row.shape.clone(),
            bits: row.bits,
            axis: row.axis,
            group_size: row.group_size,
            vector_length: row.bits.map(|_| row.vector_length.unwrap_or(1)),
            scaled: row.scaled,
            scale_block: row.scale_block,
            kept: row.kept as u64,
            sparsity: 1.0 - row.kept as f64 / numel,
            bits_per_weight: 8.0 * bytes as f64 / numel,
            bytes,
            report: row.report.clone(),
        }
    }

    /// Whether `name` is a compressed weight.
    pub fn has_weight(&self, name: &str) -> bool {
        self.metadata.weights.contains_key(name)
    }

    /// The uncompressed tensors by name: shape and bytes.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, &[i64], u64)> {
        let plain = self.file.entries().iter().filter(|(name, _)| !self.is_part(name));
        plain.map(|(name, entry)| (name.as_str(), entry.shape.as_slice(), entry.bytes()))
    }

    /// Whether the tensor `name` of the file is a part of a compressed weight.
    fn is_part(&self, name: &str) -> bool {
        Part::owner(name).is_some_and(|owner| self.has_weight(owner))
    }

    /// Reads the compressed weight `name`.
    ///
    /// # Errors
    /// [`Error::BadFile`] naming the weight if there is none, or its mask, indices, palettes,
    /// scales or values are not what they must be.
    pub fn weight(&self, name: &str) -> Result<CompressedWeight> {
        let wrong = |problem: String| Error::bad_file(self.path(), format!("`{name}`: {problem}"));
        let row = self.row(name)?;
        let mut parts = BTreeMap::new();
        for (part, ..) in row.parts().map_err(wrong)? {
            parts.insert(part, self.file.read(&part.of(name))?);
        }
        assemble(row, parts).map_err(wrong)
    }

    /// How the compressed weight `name` is stored.
    ///
    /// # Errors
    /// [`Error::BadFile`] if there is none.
    pub fn stored(&self, name: &str) -> Result<StoredLayer> {
        Ok(self.layer(name, self.row(name)?))
    }

    /// The row of the compressed weight `name`.
    pub(super) fn row(&self, name: &str) -> Result<&WeightRow> {
        let wrong = || Error::bad_file(self.path(), format!("`{name}`: is not a compressed weight of this file"));
        self.metadata.weights.get(name).ok_or_else(wrong)
    }

    /// Reads and decodes the compressed weight `name`: the dense weight in row-major order.
    ///
    /// # Errors
    /// As [`weight`](Self::weight).
    pub fn decode(&self, name: &str) -> Result<Vec<f16>> {
        self.weight(name)?.decode().map_err(|why| Error::bad_file(self.path(), format!("`{name}`: {why}")))
    }

    /// Reads the uncompressed tensor `name`, in row-major order.
    ///
    /// # Errors
    /// [`Error::Tensors`] if there is none, or it has NaN or infinite values; [`Error::Changed`];
    /// [`Error::Read`].
    pub fn tensor(&self, name: &str) -> Result<Vec<f16>> {
        let wrong = |problem: String| Error::Tensors { path: self.path().to_owned(), problem };
        if self.has_weight(name) || self.shape(name).is_none() {
            return Err(wrong(format!("tensor `{name}` is missing")));
        }
        let bytes = self.file.read(name)?;
        let mut magnitudes = Magnitudes::new(Dtype::F16).expect("fp16 is a floating-point type");
        magnitudes.add(&bytes);
        magnitudes.check(Dtype::F16).map_err(|problem| wrong(format!("`{name}` {problem}")))?;
        Ok(half_bytes::from_bytes(&bytes))
    }

    /// The dense shape of the weight or tensor `name`, if there is one.
    pub fn shape(&self, name: &str) -> Option<&[i64]> {
        match self.metadata.weights.get(name) {
            Some(row) => Some(&row.shape),
            None if self.is_part(name) => None,
            None => self.file.entries().get(name).map(|entry| entry.shape.as_slice()),
        }
    }

    /// The dense shapes of all weights and tensors by name.
    pub fn shapes(&self) -> impl Iterator<Item = (&str, &[i64])> {
        let weights = self.metadata.weights.iter().map(|(name, row)| (name.as_str(), row.shape.as_slice()));
        weights.chain(self.tensors().map(|(name, shape, _)| (name, shape)))
    }

    pub(super) fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    pub(super) fn file(&self) -> &SafetensorsFile {
        &self.file
    }
}

/// The weight of `row` from the bytes of its parts, with everything checked that can be.
fn assemble(row: &WeightRow, mut parts: BTreeMap<Part, Vec<u8>>) -> Result<CompressedWeight, String> {
    let mut take = |part: Part| parts.remove(&part).ok_or_else(|| format!("{part:?} is missing"));
    let vector_length = row.vector()?;
    let mask = match row.masked {
        true => {
            let count = numel(&row.shape)? / vector_length;
            Some(Mask::checked(take(Part::Mask)?, count).map_err(|problem| format!("the mask {problem}"))?)
        }
        false => None,
    };
    let count = row.kept / vector_length;
    if let Some(kept) = mask.as_ref().map(Mask::kept).filter(|kept| *kept != count) {
        let what = if vector_length == 1 { "elements" } else { "vectors" };
        return Err(format!("the mask keeps {kept} {what}, but there are {count} values"));
    }
    let values = match (row.bits, row.axis, row.group_size) {
        (Some(bits), Some(axis), Some(group_size)) => {
            let bits = BitWidth::try_from(bits)?;
            let palettes = half_bytes::from_bytes(&take(Part::Palettes)?);
            let indices = Packed::checked(take(Part::Indices)?, bits, count);
            let indices = indices.map_err(|problem| format!("the indices' part {problem}"))?;
            let scales = match row.scaled {
                true => Some(Scales { values: half_bytes::from_bytes(&take(Part::Scales)?), block: row.scale_block }),
                false => None,
            };
            Values::Palettized { codebook: Codebook { bits, axis, group_size, vector_length, palettes, scales }, indices }
        }
        (None, None, None) => Values::Plain(half_bytes::from_bytes(&take(Part::Values)?)),
        (Some(_) | None, ..) => return Err("must have all of bits, axis and group_size, or none".into()),
    };
    let weight = CompressedWeight { shape: row.shape.clone(), mask, values };
    weight.check_structure()?;
    weight.check_finite()?;
    Ok(weight)
}
