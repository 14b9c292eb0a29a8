//! The identity of an input file.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::digest;
use crate::error::{Error, Result};
use crate::input;

/// An input file: its name, length and hash.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SourceFile {
    /// Its length in bytes.
    pub bytes: u64,
    /// Its name, relative to the model's folder.
    pub file: String,
    /// The factor of a LoRA's changes; absent for files that are no LoRAs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scale: Option<f64>,
    /// SHA-256 of its content, 64 lower-case hex digits.
    pub sha256: String,
}

impl SourceFile {
    /// Hashes `path` and records it under the name `file`.
    ///
    /// # Errors
    /// [`Error::Read`]; [`Error::BadFile`] if it is not a regular file.
    pub fn read(path: &Path, file: impl Into<String>) -> Result<Self> {
        let mut content = input::open(path)?;
        let (sha256, bytes) = digest::of_reader(&mut content).map_err(Error::read(path))?;
        Ok(SourceFile { bytes, file: file.into(), scale: None, sha256 })
    }

    /// As [`read`](Self::read), from the whole `content` of a file that has been read.
    pub fn of_bytes(content: &[u8], file: impl Into<String>) -> Self {
        SourceFile { bytes: content.len() as u64, file: file.into(), scale: None, sha256: digest::of_bytes(content) }
    }
}
