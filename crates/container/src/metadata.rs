//! The `__metadata__` of the file's header.

use std::collections::BTreeMap;
use std::fmt::{self, Display};
use std::path::Path;

use safetensors::Dtype;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use squeeze_base::digest;
use squeeze_base::error::{Error, Result};
use squeeze_base::input::SourceFile;
use squeeze_codebook::{BitWidth, Codebook, Scales};

use super::{packed, weight};

/// The value of `format`.
pub const FORMAT: &str = "sdxl-squeeze";
/// The newest version. Version 2 has vector palettes and scales of blocks; a container without them
/// is of version 1.
pub const VERSION: u32 = 2;

/// What the UNet predicts.
const PREDICTION_TYPE: &str = "prediction_type";

/// The hash of all metadata but itself.
pub(super) const METADATA_HASH: &str = "metadata_sha256";

/// The network of a pipeline that a container holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Network {
    /// The UNet.
    Unet,
    /// The first text encoder.
    TextEncoder,
    /// The second text encoder, whose pooled text the UNet is told.
    #[serde(rename = "text_encoder_2")]
    TextEncoder2,
    /// The VAE: its decoder, and its encoder where the model has one.
    Vae,
}

impl Network {
    /// All networks, in the order in which a picture needs them.
    pub const ALL: [Network; 4] = [Network::TextEncoder, Network::TextEncoder2, Network::Unet, Network::Vae];

    /// The name of the network's folder in diffusers' layout.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Network::Unet => "unet",
            Network::TextEncoder => "text_encoder",
            Network::TextEncoder2 => "text_encoder_2",
            Network::Vae => "vae",
        }
    }

    /// The metadata key of the network's `config.json`. A container has one of these keys, which
    /// tells its network.
    fn config_key(self) -> &'static str {
        match self {
            Network::Unet => "unet_config",
            Network::TextEncoder => "text_encoder_config",
            Network::TextEncoder2 => "text_encoder_2_config",
            Network::Vae => "vae_config",
        }
    }
}

impl Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Facts about a container as a whole.
#[derive(Debug, Clone, PartialEq)]
pub struct ContainerInfo {
    /// The network that the tensors are of.
    pub network: Network,
    /// The network's `config.json`.
    pub config: Map<String, Value>,
    /// The configuration that the weights were compressed with, as resolved.
    pub recipe: Value,
    /// The files that the uncompressed weights came from.
    pub sources: Vec<SourceFile>,
    /// What the UNet predicts (`epsilon`, `v_prediction`, `sample`), which a sampler must know;
    /// `None` if it is not known, as in containers of older programs, and for other networks.
    pub prediction_type: Option<String>,
}

/// A compressed weight's entry in `weights`. Unknown keys are refused: they could change the
/// meaning of the parts. The fields are in alphabetical order, in which they are written.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct WeightRow {
    /// The axis whose channels are grouped; `bits`, `axis` and `group_size` are there if the weight
    /// is palettized.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub axis: Option<usize>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bits: Option<u8>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group_size: Option<usize>,
    /// Kept elements.
    pub kept: usize,
    /// Whether there is a mask.
    pub masked: bool,
    /// The compressor's report; null if there is none.
    #[serde(default, skip_serializing_if = "Value::is_null")]
    pub report: Value,
    /// The columns of an output channel that share a scale; absent if all of them do, as in all of
    /// version 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scale_block: Option<usize>,
    /// Whether there are scales.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub scaled: bool,
    /// SHA-256 of the decoded weight's fp16 bytes.
    pub sha256: String,
    /// The dense weight's shape.
    pub shape: Vec<i64>,
    /// The values in a palette's entry, and the output channels that share an index; absent for
    /// scalar palettes, as in all of version 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vector_length: Option<usize>,
}

/// A part of a compressed weight: a tensor of the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Part {
    Mask,
    Indices,
    Palettes,
    Scales,
    Values,
}

impl Part {
    const ALL: [Part; 5] = [Part::Mask, Part::Indices, Part::Palettes, Part::Scales, Part::Values];

    fn suffix(self) -> &'static str {
        match self {
            Part::Mask => "mask",
            Part::Indices => "indices",
            Part::Palettes => "palettes",
            Part::Scales => "scales",
            Part::Values => "values",
        }
    }

    /// The name of the tensor that holds this part of `weight`.
    pub(crate) fn of(self, weight: &str) -> String {
        format!("{weight}.{}", self.suffix())
    }

    /// The weight that a tensor of this name would be a part of.
    pub(crate) fn owner(name: &str) -> Option<&str> {
        let (weight, suffix) = name.rsplit_once('.')?;
        Part::ALL.iter().any(|part| part.suffix() == suffix).then_some(weight)
    }
}

impl WeightRow {
    /// The tensors that the weight consists of: which, dtype and shape.
    ///
    /// # Errors
    /// If the row contradicts itself.
    pub(crate) fn parts(&self) -> Result<Vec<(Part, Dtype, Vec<i64>)>, String> {
        let numel = weight::numel(&self.shape)?;
        if self.kept > numel || (!self.masked && self.kept != numel) {
            return Err(format!("{} elements are said to be kept of {numel}", self.kept));
        }
        let vector = self.vector()?;
        if !self.kept.is_multiple_of(vector) {
            return Err(format!("{} elements are said to be kept, which are no vectors of {vector}", self.kept));
        }
        let mut parts = Vec::new();
        if self.masked {
            parts.push((Part::Mask, Dtype::U8, vec![length((numel / vector).div_ceil(8))?]));
        }
        match (self.bits, self.axis, self.group_size) {
            (Some(bits), Some(axis), Some(group_size)) => {
                let bits = BitWidth::try_from(bits)?;
                let groups = Codebook::groups_of(&weight::sizes(&self.shape), axis, group_size)?;
                parts.push((Part::Indices, Dtype::U8, vec![length(packed::byte_count(self.kept / vector, bits)?)?]));
                let mut palettes = vec![length(groups)?, length(bits.entries())?];
                if vector > 1 {
                    palettes.push(length(vector)?);
                }
                parts.push((Part::Palettes, Dtype::F16, palettes));
            }
            (None, None, None) if self.masked => parts.push((Part::Values, Dtype::F16, vec![length(self.kept)?])),
            (None, None, None) => return Err("is neither pruned nor palettized".into()),
            _ => return Err("must have all of bits, axis and group_size, or none".into()),
        }
        match (self.scaled, self.scale_block, self.bits, self.shape.as_slice()) {
            (false, None, ..) => {}
            (false, Some(_), ..) => return Err("has a `scale_block` but no scales".into()),
            (true, None, Some(_), [rows, ..]) => parts.push((Part::Scales, Dtype::F16, vec![*rows])),
            (true, block, Some(_), [rows, columns @ ..]) => {
                let columns = weight::sizes(columns).iter().product();
                parts.push((Part::Scales, Dtype::F16, vec![*rows, length(Scales::in_row(block, columns)?)?]));
            }
            (true, ..) => return Err("has scales but no palettes".into()),
        }
        Ok(parts)
    }

    /// The key of the row that version 1 does not have, if there is one.
    fn of_version_2(&self) -> Option<&'static str> {
        let keys = [("vector_length", self.vector_length), ("scale_block", self.scale_block)];
        keys.into_iter().find_map(|(key, value)| value.map(|_| key))
    }

    /// The values in a palette's entry: 1 for scalar palettes, and for weights without palettes.
    ///
    /// # Errors
    /// If vectors of this length have no place in this weight.
    pub(crate) fn vector(&self) -> Result<usize, String> {
        let Some(length) = self.vector_length else { return Ok(1) };
        let (Some(axis), Some(group_size)) = (self.axis, self.group_size) else {
            return Err("has vectors but no palettes".into());
        };
        weight::check_vectors(length, axis, group_size, self.scaled)?;
        Ok(length)
    }
}

/// A length as a dimension.
fn length(n: usize) -> Result<i64, String> {
    i64::try_from(n).map_err(|_| format!("{n} is too long"))
}

/// The parsed `__metadata__`.
#[derive(Debug)]
pub(super) struct Metadata {
    pub info: ContainerInfo,
    /// The format's version.
    pub version: u32,
    /// The compressed weights by name.
    pub weights: BTreeMap<String, WeightRow>,
    /// The hash of all bytes after the header.
    pub data_sha256: String,
    /// The hash of the header's table of tensors, see [`table_hash`].
    pub tensors_sha256: String,
}

impl Metadata {
    /// The lowest version that has a place for all of `weights`.
    pub(crate) fn version_for(weights: &BTreeMap<String, WeightRow>) -> u32 {
        if weights.values().any(|row| row.of_version_2().is_some()) { 2 } else { 1 }
    }

    /// The strings of the safetensors header's `__metadata__`.
    pub(crate) fn to_entries(&self) -> BTreeMap<String, String> {
        let mut entries = BTreeMap::from([
            ("format".to_owned(), FORMAT.to_owned()),
            ("version".to_owned(), self.version.to_string()),
            (self.info.network.config_key().to_owned(), to_json(&self.info.config)),
            ("recipe".to_owned(), to_json(&self.info.recipe)),
            ("sources".to_owned(), to_json(&self.info.sources)),
            ("weights".to_owned(), to_json(&self.weights)),
            ("data_sha256".to_owned(), self.data_sha256.clone()),
            ("tensors_sha256".to_owned(), self.tensors_sha256.clone()),
        ]);
        entries.extend(self.info.prediction_type.iter().map(|prediction| (PREDICTION_TYPE.to_owned(), prediction.clone())));
        let hash = digest::of_entries(text_pairs(&entries));
        entries.insert(METADATA_HASH.to_owned(), hash);
        entries
    }

    /// Parses the metadata of the file `path`.
    ///
    /// # Errors
    /// [`Error::BadFile`] if it is not a container, of another version, damaged, or lacks
    /// something.
    pub(crate) fn from_entries(path: &Path, entries: &BTreeMap<String, String>) -> Result<Self> {
        let wrong = |problem: String| Error::bad_file(path, problem);
        let text = |key: &str| entries.get(key).ok_or_else(|| wrong(format!("the metadata lacks `{key}`")));
        if entries.get("format").map(String::as_str) != Some(FORMAT) {
            return Err(wrong(format!("not a container: its metadata does not say format = {FORMAT}")));
        }
        let version = text("version")?;
        let Some(version) = (1..=VERSION).find(|known| *version == known.to_string()) else {
            let version: String = version.chars().take(20).collect();
            return Err(wrong(format!("a container of version `{version}`; versions 1 to {VERSION} are read")));
        };
        if *text(METADATA_HASH)? != digest::of_entries(text_pairs(entries).filter(|(key, _)| *key != METADATA_HASH)) {
            return Err(wrong(format!("the metadata is damaged: it does not have the hash that `{METADATA_HASH}` says")));
        }
        let told: Vec<Network> = Network::ALL.into_iter().filter(|network| entries.contains_key(network.config_key())).collect();
        let network = match told[..] {
            [] => Network::Unet,
            [network] => network,
            [one, other, ..] => {
                let (one, other) = (one.config_key(), other.config_key());
                return Err(wrong(format!("the metadata has both `{one}` and `{other}`, of which a container has one")));
            }
        };
        let key = network.config_key();
        let info = ContainerInfo {
            network,
            config: json(path, key, text(key)?)?,
            recipe: json(path, "recipe", text("recipe")?)?,
            sources: json(path, "sources", text("sources")?)?,
            prediction_type: entries.get(PREDICTION_TYPE).cloned(),
        };
        let weights: BTreeMap<String, WeightRow> = json(path, "weights", text("weights")?)?;
        match (version, weights.iter().find_map(|(name, row)| Some((name, row.of_version_2()?)))) {
            (1, Some((name, key))) => {
                return Err(wrong(format!("`{name}` has a `{key}`, which version 1 does not know")));
            }
            // Equal weights have equal bytes: none has two versions.
            (2.., None) => {
                let problem = "a container of version `2`, in which no weight has a `vector_length` or a `scale_block`";
                return Err(wrong(problem.into()));
            }
            (_, Some(_) | None) => {}
        }
        let (data_sha256, tensors_sha256) = (text("data_sha256")?.clone(), text("tensors_sha256")?.clone());
        Ok(Metadata { info, version, weights, data_sha256, tensors_sha256 })
    }
}

fn text_pairs(entries: &BTreeMap<String, String>) -> impl Iterator<Item = (&str, &str)> {
    entries.iter().map(|(key, value)| (key.as_str(), value.as_str()))
}

/// The hash of which tensors there are and where: a line `name=dtype shape` each, in the order of
/// their data. `tensors` gives name, dtype, shape, and where the data begins and ends.
pub(super) fn table_hash<'a>(tensors: impl Iterator<Item = (&'a str, Dtype, &'a [i64], [u64; 2])>) -> String {
    // Without data, begin and end cannot tell two tensors apart; their names do.
    let mut tensors: Vec<_> = tensors.map(|(name, dtype, shape, place)| (place, name, format!("{dtype} {shape:?}"))).collect();
    tensors.sort();
    digest::of_entries(tensors.iter().map(|(_, name, value)| (*name, value.as_str())))
}

fn json<T: DeserializeOwned>(path: &Path, key: &str, text: &str) -> Result<T> {
    serde_json::from_str(text).map_err(|why| Error::bad_file(path, format!("the metadata's `{key}`: {why}")))
}

fn to_json(value: &impl Serialize) -> String {
    serde_json::to_string(value).expect("plain structs, and maps whose keys are text, can be written as JSON")
}
