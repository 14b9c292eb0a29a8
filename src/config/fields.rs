//! Reads a mapping of the config key by key.

use squeeze_base::shorten::shorten;

use super::finding::Finding;
use super::key::{Key, Section};
use super::limits;
use super::mistake::{Mistakes, nearest};
use super::tree::{Node, Position, Value};

/// The entries of one mapping, of which the keys are known to the section.
#[derive(Debug)]
pub(super) struct Fields<'a> {
    /// The mapping's name in messages: `prune.global_config`.
    name: String,
    section: &'static Section,
    position: Position,
    entries: Vec<Entry<'a>>,
}

/// A key that has been checked to be text and to be the first of its name.
#[derive(Debug, Clone, Copy)]
pub(super) struct Entry<'a> {
    pub key: &'a str,
    pub position: Position,
    pub value: &'a Node,
}

/// The text keys of a mapping in order. Other keys, repeated ones, and nodes that are no mapping
/// are mistakes.
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
            Some(first) => mistakes.add(key.position, format!("`{}` is given twice, first in {}", shorten(text), first.position)),
            None => entries.push(Entry { key: text, position: key.position, value }),
        }
    }
    entries
}

impl<'a> Fields<'a> {
    /// Takes a node apart. What is no mapping, and every key that the section does not have, is a
    /// mistake.
    pub(super) fn new(name: &str, section: &'static Section, node: &'a Node, mistakes: &mut Mistakes<'_>) -> Self {
        let fields = Fields { name: name.to_owned(), section, position: node.position, entries: entries(name, node, mistakes) };
        for Entry { key, position, .. } in &fields.entries {
            if !section.known().any(|known| known == *key) && !section.was_known(key) {
                mistakes.add(*position, fields.unknown(key));
            }
        }
        fields
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Where the mapping begins.
    pub(super) fn position(&self) -> Position {
        self.position
    }

    /// The entry of `key`, `null` or not.
    pub(super) fn entry(&self, key: &str) -> Option<Entry<'a>> {
        self.entries.iter().find(|entry| entry.key == key).copied()
    }

    /// The value of `key`, unless that is absent or `null`.
    pub(super) fn given(&self, key: &str) -> Option<&'a Node> {
        self.entry(key).map(|entry| entry.value).filter(|node| !matches!(node.value, Value::Null))
    }

    /// A section in the mapping, unless that is absent or `null`.
    pub(super) fn section(&self, section: &'static Section, mistakes: &mut Mistakes<'_>) -> Option<Fields<'a>> {
        self.given(section.name).map(|node| Fields::new(section.name, section, node, mistakes))
    }

    /// The value of `key`, if it is given and can be read. Under a former name it is read with a
    /// remark.
    pub(super) fn get<T>(&self, key: &Key<T>, mistakes: &mut Mistakes<'_>) -> Option<T> {
        let former = key.formerly.and_then(|old| Some((old, self.given(old)?)));
        let (name, node) = match (former, self.given(key.name)) {
            (None, present) => (key.name, present?),
            (Some((old, node)), present) => {
                if present.is_some() {
                    mistakes.add(node.position, format!("`{old}` is the former name of `{}`; give one", key.name));
                }
                let place = mistakes.place(node.position);
                mistakes.remark(Finding::FormerName { old: old.to_owned(), new: key.name.to_owned(), place });
                (old, node)
            }
        };
        match (key.kind.read)(node) {
            Ok(value) => Some(value),
            Err(must) => {
                mistakes.add(node.position, format!("`{name}` {must}, not {}", node.value));
                None
            }
        }
    }

    /// The value of `key`, or its default.
    pub(super) fn value<T>(&self, key: &Key<T>, mistakes: &mut Mistakes<'_>) -> T {
        self.get(key, mistakes).unwrap_or_else(|| key.default_value())
    }

    fn unknown(&self, key: &str) -> String {
        let known = || self.section.known();
        let hint = match (nearest(key, known()), elsewhere(key)) {
            (Some(near), _) => format!("; did you mean `{near}`?"),
            (None, Some(hint)) => format!("; {hint}"),
            (None, None) => format!(" (known: {})", known().collect::<Vec<_>>().join(", ")),
        };
        format!("unknown key `{}` in {}{hint}", shorten(key), self.name)
    }
}

/// A hint for coremltools' keys that belong to another section here, or that this program does not
/// have.
fn elsewhere(key: &str) -> Option<&'static str> {
    Some(match key {
        "calibration_nsamples" => "it belongs to calibration",
        "layers" | "algorithm" => "it belongs to prune itself, once for all its layers",
        "on_misfit" | "weight_threshold" => "it belongs to palettize itself, once for all its layers",
        "weight_dtype" => "SparseGPT here prunes only; palettize sets the bits",
        "input_cacher" => "the UNet's inputs are always recorded",
        "lut_dtype" => "palettes here are of fp16",
        "enable_fast_kmeans_mode" | "rounding_precision" => "palettes here are always exact",
        _ => return None,
    })
}

pub(super) fn number(node: &Node) -> Result<f64, String> {
    match node.value {
        Value::Integer(value) => Ok(value as f64),
        Value::Number(value) => Ok(value),
        Value::Null | Value::Boolean(_) | Value::Text(_) | Value::List(_) | Value::Mapping(_) => Err("must be a number".into()),
    }
}

pub(super) fn whole(node: &Node) -> Result<i128, String> {
    match node.value {
        Value::Integer(value) => Ok(value),
        Value::Null | Value::Boolean(_) | Value::Number(_) | Value::Text(_) | Value::List(_) | Value::Mapping(_) => {
            Err("must be a whole number".into())
        }
    }
}

pub(super) fn boolean(node: &Node) -> Result<bool, String> {
    match node.value {
        Value::Boolean(value) => Ok(value),
        Value::Null | Value::Integer(_) | Value::Number(_) | Value::Text(_) | Value::List(_) | Value::Mapping(_) => {
            Err("must be true or false".into())
        }
    }
}

pub(super) fn text(node: &Node) -> Result<&str, String> {
    match &node.value {
        Value::Text(value) => limits::not_blank(value),
        Value::Null | Value::Boolean(_) | Value::Integer(_) | Value::Number(_) | Value::List(_) | Value::Mapping(_) => {
            Err("must be text (in quotes, if need be)".into())
        }
    }
}

/// The entries of a list that are text. The others are mistakes.
pub(super) fn texts<'a>(key: &str, list: &'a [Node], mistakes: &mut Mistakes<'_>) -> Vec<(&'a str, Position)> {
    let mut texts = Vec::new();
    for node in list {
        match text(node) {
            Ok(text) => texts.push((text, node.position)),
            Err(must) => mistakes.add(node.position, format!("an entry of `{key}` {must}, not {}", node.value)),
        }
    }
    texts
}

/// One of several words.
pub(super) fn word<T: Copy>(node: &Node, words: &[(&'static str, T)]) -> Result<T, String> {
    let written = match &node.value {
        Value::Text(written) => Some(written),
        Value::Null | Value::Boolean(_) | Value::Integer(_) | Value::Number(_) | Value::List(_) | Value::Mapping(_) => None,
    };
    if let Some((_, value)) = words.iter().find(|(word, _)| written.is_some_and(|written| written == word)) {
        return Ok(*value);
    }
    let words: Vec<&str> = words.iter().map(|(word, _)| *word).collect();
    Err(match written.and_then(|written| nearest(written, words.iter().copied())) {
        Some(near) if words.len() > 1 => format!("must be one of {}, perhaps `{near}`", words.join(", ")),
        Some(_) | None => format!("must be {}", words.join(", or ")),
    })
}
