//! The manifest, by the rules of Apple's own check (coremltools: `ModelPackage.cpp`, `validate`).

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};

use serde::Deserialize;
use squeeze_base::error::{Error, Result};
use squeeze_base::input::{self, Limit};

use crate::manifest as layout;

/// The paths of a package's parts.
pub(super) struct Parts {
    pub model: PathBuf,
    pub weights: PathBuf,
    /// The manifest itself.
    pub text: String,
    /// Whether an item is called as this library calls items.
    pub has_our_identifiers: bool,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Manifest {
    file_format_version: String,
    item_info_entries: BTreeMap<String, Item>,
    root_model_identifier: String,
}

#[derive(Deserialize)]
struct Item {
    #[serde(rename = "author")]
    _author: String,
    #[serde(rename = "description")]
    _description: String,
    name: String,
    path: String,
}

pub(super) fn read(package: &Path) -> Result<Parts> {
    let path = package.join("Manifest.json");
    let text = input::read_text(&path, Limit::MANIFEST)?;
    let manifest: Manifest = serde_json::from_str(&text).map_err(|source| Error::Json { path: path.clone(), source })?;
    let wrong = |problem: String| Error::bad_file(&path, problem);

    let Manifest { file_format_version, item_info_entries, root_model_identifier } = manifest;
    if file_format_version != layout::VERSION {
        return Err(wrong(format!("of version `{file_format_version}`; {} is read", layout::VERSION)));
    }
    for (identifier, item) in &item_info_entries {
        let inside = Path::new(&item.path).components().all(|part| matches!(part, Component::Normal(_)));
        if !inside || item.path.is_empty() {
            return Err(wrong(format!("`{}` is not a path inside the package", item.path)));
        }
        if !package.join("Data").join(&item.path).exists() {
            return Err(wrong(format!("{identifier}: Data/{} is not there", item.path)));
        }
    }
    let root = item_info_entries.get(&root_model_identifier);
    let root = root.ok_or_else(|| wrong("`rootModelIdentifier` is none of the items".into()))?;
    let weights = item_info_entries.values().find(|item| item.name == "weights");
    let weights = weights.ok_or_else(|| wrong("there is no item `weights`".into()))?;
    if (root.path.as_str(), weights.path.as_str()) != (layout::MODEL, layout::WEIGHTS) {
        return Err(wrong(format!("model and weights lie at {} and {}", root.path, weights.path)));
    }
    let data = package.join("Data");
    let has_our_identifiers = item_info_entries.keys().any(|identifier| layout::is_ours(identifier));
    let (model, weights) = (data.join(layout::MODEL), data.join(layout::WEIGHTS).join(layout::BLOBS));
    Ok(Parts { model, weights, text, has_our_identifiers })
}
