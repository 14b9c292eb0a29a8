//! Checks a container to the last bit.

use std::path::PathBuf;

use rayon::prelude::*;
use serde::Serialize;
use squeeze_base::error::{Error, Result};
use squeeze_base::input::SourceFile;

use super::half_bytes;
use super::metadata::Network;
use super::reader::{Container, StoredLayer};

/// A verified container, in numbers.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Verification {
    /// The file.
    #[serde(serialize_with = "squeeze_base::shorten::path_as_text")]
    pub path: PathBuf,
    /// The network that it holds.
    pub network: Network,
    /// Its length.
    pub bytes: u64,
    /// The bytes of tensors; the rest is the header with names and metadata.
    pub payload_bytes: u64,
    /// The format's version.
    pub version: u32,
    /// Compressed weights.
    pub weights: usize,
    /// Their elements, kept and pruned.
    pub weight_elements: u64,
    /// Their kept elements.
    pub kept: u64,
    /// Their bytes.
    pub weight_bytes: u64,
    /// The pruned elements' share among them, 0 to 1.
    pub sparsity: f64,
    /// Stored bits for each of their elements.
    pub bits_per_weight: f64,
    /// Uncompressed tensors.
    pub tensors: usize,
    /// Their elements.
    pub tensor_elements: u64,
    /// Their bytes.
    pub tensor_bytes: u64,
    /// The files that the weights came from.
    pub sources: Vec<SourceFile>,
}

impl Container {
    /// Checks the content of every weight: the mask's count, bits that must be zero, that all
    /// values are finite, and the hash of the decoded weight. Then checks the hash of all data.
    ///
    /// # Errors
    /// [`Error::BadFile`] naming the weights that are damaged; [`Error::Read`].
    pub fn verify(&self) -> Result<Verification> {
        let rows: Vec<_> = self.metadata().weights.iter().collect();
        let damaged: Vec<Option<String>> = rows
            .par_iter()
            .map(|(name, row)| match self.weight(name).and_then(|weight| weight.decode()) {
                Err(Error::BadFile { problem, .. }) => Some(problem),
                Err(why) => Some(format!("`{name}`: {why}")),
                Ok(dense) if half_bytes::sha256(&dense) != row.sha256 => {
                    Some(format!("`{name}` is not the weight that was written (its hash differs)"))
                }
                Ok(_) => None,
            })
            .collect();
        let tensors: Vec<_> = self.tensors().collect();
        let mut problems: Vec<String> = damaged.into_iter().flatten().collect();
        for (name, ..) in &tensors {
            if half_bytes::from_bytes(&self.file().read(name)?).iter().any(|value| !value.is_finite()) {
                problems.push(format!("`{name}` has NaN or infinite values"));
            }
        }
        // If the file was changed meanwhile, its problems are those of two files.
        self.file().check_unchanged()?;
        self.no_problems(problems)?;

        let (data_sha256, payload_bytes) = self.file().data_sha256()?;
        if data_sha256 != self.metadata().data_sha256 {
            return Err(self.damaged_data());
        }
        let bytes = self.file().bytes();
        let layers: Vec<StoredLayer> = self.layers().collect();
        let elements = |shape: &[i64]| shape.iter().map(|n| *n as u64).product::<u64>();
        let weight_elements = layers.iter().map(|layer| elements(&layer.shape)).sum::<u64>();
        let kept = layers.iter().map(|layer| layer.kept).sum::<u64>();
        let weight_bytes = layers.iter().map(|layer| layer.bytes).sum::<u64>();
        let per_element = |n: f64| if weight_elements == 0 { 0.0 } else { n / weight_elements as f64 };
        Ok(Verification {
            path: self.path().to_owned(),
            network: self.info().network,
            bytes,
            payload_bytes,
            version: self.metadata().version,
            weights: layers.len(),
            weight_elements,
            kept,
            weight_bytes,
            sparsity: per_element((weight_elements - kept) as f64),
            bits_per_weight: per_element(8.0 * weight_bytes as f64),
            tensors: tensors.len(),
            tensor_elements: tensors.iter().map(|(_, shape, _)| elements(shape)).sum(),
            tensor_bytes: tensors.iter().map(|(.., bytes)| bytes).sum(),
            sources: self.info().sources.clone(),
        })
    }

    /// Checks the hash of all data in one pass over the file. If it differs,
    /// [`verify`](Self::verify) names the damaged weights.
    pub(super) fn check_data(&self) -> Result<()> {
        if self.file().data_sha256()?.0 == self.metadata().data_sha256 {
            return Ok(());
        }
        self.verify()?;
        Err(self.damaged_data())
    }

    fn damaged_data(&self) -> Error {
        Error::bad_file(self.path(), "the data is damaged: it does not have the hash that `data_sha256` says")
    }
}
