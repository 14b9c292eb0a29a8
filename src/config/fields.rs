//! A mapping of the config being taken apart, key by key.

use std::path::PathBuf;

use super::limits;
use super::mistake::{Mistakes, nearest};
use super::tree::{Node, Position, Value};
use crate::shorten::shorten;

/// The entries of one mapping. Each key is taken once; [`finish`](Self::finish) complains of what nobody took, so that the list
/// of known keys is the code that reads them.
#[derive(Debug)]
pub(super) struct Fields<'a> {
    /// What the mapping is called in messages: `prune.global_config`.
    name: String,
    position: Position,
    entries: Vec<Entry<'a>>,
    known: Vec<&'static str>,
}

/// A key that has been checked to be text and to be the first of its name.
#[derive(Debug, Clone, Copy)]
pub(super) struct Entry<'a> {
    pub key: &'a str,
    pub position: Position,
    pub value: &'a Node,
}

/// The text keys of a mapping in order. Other keys, repeated ones, and nodes that are no mapping are mistakes.
pub(super) fn entries<'a>(name: &str, node: &'a Node, mistakes: &mut Mistakes<'_>) -> Vec<Entry<'a>> {
    let Value::Mapping(pairs) = &node.value else {
        mistakes.add(node.position, format!("{name} must be a mapping of keys to values, not {}", node.value));
        return Vec::new();
    };
    let mut entries: Vec<Entry<'a>> = Vec::new();
    for (key, value) in pairs {
        let Value::Text(text) = &key.value else {
            mistakes.add(key.position, format!("a key of {name} must be text, not {}", key.value));
            continue;
        };
        match entries.iter().find(|entry| entry.key == text) {
            Some(first) => {
                mistakes.add(key.position, format!("`{}` is given twice, first in line {}", shorten(text), first.position.line))
            }
            None => entries.push(Entry { key: text, position: key.position, value }),
        }
    }
    entries
}

impl<'a> Fields<'a> {
    pub fn new(name: &str, node: &'a Node, mistakes: &mut Mistakes<'_>) -> Self {
        Fields { name: name.to_owned(), position: node.position, entries: entries(name, node, mistakes), known: Vec::new() }
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where it begins.
    pub fn position(&self) -> Position {
        self.position
    }

    /// The entry of `key`, `null` or not.
    pub fn entry(&mut self, key: &'static str) -> Option<Entry<'a>> {
        if !self.known.contains(&key) {
            self.known.push(key);
        }
        self.entries.iter().find(|entry| entry.key == key).copied()
    }

    /// The value of `key`; `null` is the same as not given.
    pub fn given(&mut self, key: &'static str) -> Option<&'a Node> {
        self.entry(key).map(|entry| entry.value).filter(|node| !matches!(node.value, Value::Null))
    }

    /// The value of `key` through `read`, or the mistake that it is.
    pub fn get<T>(
        &mut self,
        key: &'static str,
        mistakes: &mut Mistakes<'_>,
        read: impl FnOnce(&'a Node) -> Result<T, String>,
    ) -> Option<T> {
        let node = self.given(key)?;
        match read(node) {
            Ok(value) => Some(value),
            Err(must) => {
                mistakes.add(node.position, format!("`{key}` {must}, not {}", node.value));
                None
            }
        }
    }

    /// Complains of the keys that nobody took.
    pub fn finish(self, mistakes: &mut Mistakes<'_>) {
        for Entry { key, position, .. } in &self.entries {
            if self.known.contains(key) {
                continue;
            }
            let hint = match (nearest(key, self.known.iter().copied()), elsewhere(key)) {
                (Some(near), _) => format!("; did you mean `{near}`?"),
                (None, Some(hint)) => format!("; {hint}"),
                (None, None) => format!(" (known: {})", self.known.join(", ")),
            };
            mistakes.add(*position, format!("unknown key `{}` in {}{hint}", shorten(key), self.name));
        }
    }
}

/// What to say of coremltools' own keys that stand in another place here, or that this program does not have.
fn elsewhere(key: &str) -> Option<&'static str> {
    Some(match key {
        "calibration_nsamples" => "it belongs to calibration",
        "layers" | "algorithm" => "it belongs to prune itself, once for all its layers",
        "on_misfit" | "weight_threshold" => "it belongs to palettize itself, once for all its layers",
        "weight_dtype" => "SparseGPT here prunes only; palettize sets the bits",
        "input_cacher" => "the UNet's inputs are always recorded",
        "lut_dtype" | "cluster_dim" => "palettes here are of fp16 scalars",
        "enable_fast_kmeans_mode" | "rounding_precision" => "palettes here are always exact",
        _ => return None,
    })
}

pub(super) fn number(node: &Node) -> Result<f64, String> {
    match node.value {
        Value::Integer(value) => Ok(value as f64),
        Value::Number(value) => Ok(value),
        _ => Err("must be a number".into()),
    }
}

pub(super) fn whole(node: &Node) -> Result<i128, String> {
    match node.value {
        Value::Integer(value) => Ok(value),
        _ => Err("must be a whole number".into()),
    }
}

pub(super) fn boolean(node: &Node) -> Result<bool, String> {
    match node.value {
        Value::Boolean(value) => Ok(value),
        _ => Err("must be true or false".into()),
    }
}

pub(super) fn text(node: &Node) -> Result<&str, String> {
    match &node.value {
        Value::Text(value) => limits::not_blank(value),
        _ => Err("must be text (in quotes, if need be)".into()),
    }
}

pub(super) fn path(node: &Node) -> Result<PathBuf, String> {
    text(node).map(PathBuf::from)
}

/// One of several words.
pub(super) fn word<T: Copy>(node: &Node, words: &[(&'static str, T)]) -> Result<T, String> {
    named(text(node).unwrap_or_default(), words)
}

/// The value that `name` stands for.
pub(super) fn named<T: Copy>(name: &str, words: &[(&'static str, T)]) -> Result<T, String> {
    let found = words.iter().find(|(word, _)| *word == name);
    found.map(|(_, value)| *value).ok_or_else(|| {
        let words: Vec<&str> = words.iter().map(|(word, _)| *word).collect();
        match nearest(name, words.iter().copied()) {
            Some(near) if words.len() > 1 => format!("must be one of {}, perhaps `{near}`", words.join(", ")),
            _ => format!("must be {}", words.join(", or ")),
        }
    })
}
