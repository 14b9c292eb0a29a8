//! Reads a `config.json` key by key, so that no key that changes the computation is overlooked.

use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use squeeze_base::error::{Error, Result};
use squeeze_base::input::{self, Limit};
use squeeze_base::shorten::shorten;

/// A diffusers or transformers config file whose keys are taken one by one.
///
/// Each key is taken once: as a setting that is honoured ([`or`](Self::or),
/// [`required`](Self::required)), as one that is refused unless it has its neutral value
/// ([`only`](Self::only)), or as one that has no effect on inference ([`ignore`](Self::ignore)).
/// [`finish`](Self::finish) warns of the other keys, which diffusers ignores silently.
#[derive(Debug)]
pub struct ConfigFile {
    path: PathBuf,
    entries: Map<String, Value>,
}

impl ConfigFile {
    /// Reads and parses `path`.
    ///
    /// # Errors
    /// If the file cannot be read, is not a regular file, is larger than [`Limit::MODEL_CONFIG`],
    /// or is not a JSON object.
    pub fn read(path: &Path) -> Result<Self> {
        ConfigFile::read_within(path, Limit::MODEL_CONFIG)
    }

    /// As [`read`](Self::read), for a JSON object of another kind and size.
    pub(crate) fn read_within(path: &Path, limit: Limit) -> Result<Self> {
        Self::from_bytes(path, &input::read(path, limit)?)
    }

    /// Parses `content`, which was read from `path`.
    ///
    /// # Errors
    /// If it is not a JSON object.
    pub fn from_bytes(path: &Path, content: &[u8]) -> Result<Self> {
        match serde_json::from_slice(content) {
            Ok(Value::Object(entries)) => Ok(Self::from_entries(path, entries)),
            Ok(_) => Err(Error::bad_file(path, "not a JSON object")),
            Err(source) => Err(Error::Json { path: path.to_owned(), source }),
        }
    }

    /// A config that is already in memory; `path` names it in errors.
    #[must_use]
    pub fn from_entries(path: &Path, entries: Map<String, Value>) -> Self {
        ConfigFile { path: path.to_owned(), entries }
    }

    /// The file's path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The entries that were not taken.
    #[must_use]
    pub fn into_entries(self) -> Map<String, Value> {
        self.entries
    }

    /// Takes `key`; absent or `null` gives `None`.
    ///
    /// # Errors
    /// If the value has another type.
    pub fn optional<T: DeserializeOwned>(&mut self, key: &str) -> Result<Option<T>> {
        match self.entries.remove(key) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => {
                let shown = value.to_string();
                serde_json::from_value(value)
                    .map(Some)
                    .map_err(|why| self.error(key, format!("cannot be {}: {}", shorten(&shown), shorten(&why.to_string()))))
            }
        }
    }

    /// Takes `key`; absent or `null` gives `default`, which should be diffusers' own.
    ///
    /// # Errors
    /// If the value has another type.
    pub fn or<T: DeserializeOwned>(&mut self, key: &str, default: T) -> Result<T> {
        Ok(self.optional(key)?.unwrap_or(default))
    }

    /// Takes `key`.
    ///
    /// # Errors
    /// If it is absent or `null`, or the value has another type.
    pub fn required<T: DeserializeOwned>(&mut self, key: &str) -> Result<T> {
        self.optional(key)?.ok_or_else(|| self.error(key, "is missing"))
    }

    /// Takes `key` and refuses every value but the `neutral` ones; absent and `null` are always
    /// neutral.
    ///
    /// # Errors
    /// [`Error::ConfigKey`] naming the key and its value.
    pub fn only(&mut self, key: &str, neutral: &[Value]) -> Result<()> {
        match self.entries.remove(key) {
            None | Some(Value::Null) => Ok(()),
            Some(value) if neutral.iter().any(|n| same(n, &value)) => Ok(()),
            Some(value) => {
                let known: Vec<String> = neutral.iter().map(Value::to_string).collect();
                let known = if known.is_empty() { "null".to_owned() } else { known.join(" or ") };
                Err(self.error(key, format!("= {} is not supported (only {known} is)", shorten(&value.to_string()))))
            }
        }
    }

    /// Takes `key` and refuses every value but `expected`; absent means `default`, and `null` is a
    /// value like any other.
    ///
    /// # Errors
    /// [`Error::ConfigKey`] naming the key and its value.
    pub fn exactly(&mut self, key: &str, expected: &Value, default: &Value) -> Result<()> {
        let value = self.entries.remove(key).unwrap_or_else(|| default.clone());
        if same(&value, expected) {
            return Ok(());
        }
        Err(self.error(key, format!("= {} is not supported (only {expected} is)", shorten(&value.to_string()))))
    }

    /// Takes `key` as it was written, `null` included; `None` if it is absent.
    pub fn given(&mut self, key: &str) -> Option<Value> {
        self.entries.remove(key)
    }

    /// Takes keys that have no effect on inference, whatever their value.
    pub fn ignore(&mut self, keys: &[&str]) {
        for key in keys {
            self.entries.remove(*key);
        }
    }

    /// Warns of the keys that were not taken. Names with a leading underscore are diffusers' own
    /// notes.
    pub fn finish(self) {
        for (key, value) in &self.entries {
            if !key.starts_with('_') {
                let value = shorten(&value.to_string());
                let key = shorten(key);
                tracing::warn!("{}: unknown key `{key}` = {value} is ignored, as diffusers does", self.path.display());
            }
        }
    }

    /// An error about `key`.
    pub fn error(&self, key: &str, problem: impl Into<String>) -> Error {
        Error::ConfigKey { path: self.path.clone(), key: key.to_owned(), problem: problem.into() }
    }
}

/// Equality in which `1` equals `1.0`.
fn same(a: &Value, b: &Value) -> bool {
    a == b || matches!((a.as_f64(), b.as_f64()), (Some(a), Some(b)) if a == b)
}
