//! A config to compare, and where its container is.

use std::path::{Path, PathBuf};

use crate::config::RunConfig;

/// A config and the name of its row.
#[derive(Debug)]
pub struct Entry {
    /// For example `squeeze-s40-4bit-gs16`.
    pub name: String,
    /// The run.
    pub config: RunConfig,
    /// The curve of a sweep that this is a size of. Entries of one curve have configs that differ
    /// in nothing but the target of their budgets.
    pub curve: Option<String>,
}

/// Path of the file that keeps what the settings of the curve `name` cost.
#[must_use]
pub fn prices_path(out: &Path, name: &str) -> PathBuf {
    out.join(format!("{name}.prices.json"))
}

/// Path of the container of the entry `name`.
#[must_use]
pub fn container_path(out: &Path, name: &str) -> PathBuf {
    out.join(format!("{name}.squeezed.safetensors"))
}

/// Path of the facts about the container of the entry `name`: its row of the report, without
/// measurements.
#[must_use]
pub fn row_path(out: &Path, name: &str) -> PathBuf {
    out.join(format!("{name}.row.json"))
}
