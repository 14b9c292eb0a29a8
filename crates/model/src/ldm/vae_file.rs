//! A VAE in a safetensors file: alone or within a checkpoint, under LDM's or diffusers' names.

use std::path::Path;
use std::sync::Arc;

use serde_json::{Map, Value};
use squeeze_base::error::{Error, Result};
use squeeze_base::safetensors_file::SafetensorsFile;

use super::family::Family;
use super::names::Names;
use super::{part_configs, refusal};
use crate::checkpoint::{View, Weights};
use crate::vae::{VaeConfig, VaeDecoder};

/// The VAE of a safetensors file.
#[derive(Debug, Clone)]
pub struct VaeFile {
    file: Arc<SafetensorsFile>,
    prefix: &'static str,
}

impl VaeFile {
    /// Opens a file that has a VAE, alone or with other parts.
    ///
    /// # Errors
    /// [`Error::BadFile`] if it has none, or is in a form that is not read; [`Error::Read`].
    pub fn open(path: &Path) -> Result<Self> {
        let file = Arc::new(SafetensorsFile::open(path)?);
        refusal::by_tensors(&file)?;
        let found = ["first_stage_model.", ""].into_iter().find_map(|prefix| Self::within(Arc::clone(&file), prefix));
        found.ok_or_else(|| Error::bad_file(path, "has no VAE (no tensor `decoder.conv_in.weight`)"))
    }

    /// The VAE whose names begin with `prefix`, if there is one.
    pub(super) fn within(file: Arc<SafetensorsFile>, prefix: &'static str) -> Option<Self> {
        file.entries().contains_key(&format!("{prefix}decoder.conv_in.weight")).then_some(VaeFile { file, prefix })
    }

    /// The file.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// `config.json`, as shapes and family tell it; `None` if they do not, as under diffusers'
    /// names.
    #[must_use]
    pub fn config(&self, family: &Family) -> Option<Map<String, Value>> {
        let entries = self.file.entries().iter();
        let shapes =
            entries.filter_map(|(name, entry)| Some((name.strip_prefix(self.prefix)?, entry.shape.as_slice()))).collect();
        part_configs::vae(&shapes, family)
    }

    /// The weights of decoder and encoder, under diffusers' names.
    ///
    /// # Errors
    /// [`Error::BadFile`] if two tensors have one name.
    pub fn weights(&self, config: &VaeConfig) -> Result<Weights> {
        let names = Names::of_vae(config)?;
        let weights = Weights::of_file(Arc::clone(&self.file), |stored| match stored.strip_prefix(self.prefix) {
            None => Vec::new(),
            // What the VAE was trained with.
            Some(stored) if stored.starts_with("loss.") || stored.starts_with("model_ema.") => Vec::new(),
            Some(stored) => names.views(stored).into_iter().map(renamed).collect(),
        })?;
        Ok(weights.with_linear(VaeDecoder::is_linear))
    }
}

/// Gives a view diffusers' current name.
fn renamed(view: View) -> View {
    View { name: VaeDecoder::rename(&view.name), ..view }
}
