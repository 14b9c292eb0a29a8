//! The kinds of values that config keys take: how each is read, and what docs and schema say of it.
//!
//! The bounds are checked in [`limits`](super::limits).

use std::convert::Infallible;
use std::path::PathBuf;

use sdxl_pipeline::LoraFile;
use serde_json::json;
use squeeze_base::pattern::NamePattern;
use squeeze_codebook::{BitWidth, NmRatio};

use super::fields::{boolean, number, text, whole, word};
use super::key::{Argument, Kind};
use super::limits;
use super::tree::{Node, Value};
use super::words::{Feed, Words};

macro_rules! kind {
    ($argument:ident, $values:expr, $schema:tt, $read:expr) => {
        Kind { read: $read, values: || $values.into(), schema: || json!($schema), argument: Argument::$argument }
    };
}

impl<T: Words> Kind<T> {
    /// One of an enum's words.
    pub(super) const WORD: Kind<T> = Kind {
        read: |node| word(node, &T::words()),
        values: || T::words().iter().map(|(word, _)| format!("`{word}`")).collect::<Vec<_>>().join(", "),
        schema: || json!({ "enum": T::words().iter().map(|(word, _)| *word).collect::<Vec<_>>() }),
        argument: Argument::Text,
    };
}

pub(super) const BOOLEAN: Kind<bool> = kind!(Switch, "`true`, `false`", { "type": "boolean" }, boolean);

pub(super) const COUNT: Kind<usize> = kind!(Number, "a whole number from 1", { "type": "integer", "minimum": 1, "maximum": u32::MAX }, |node| limits::count(
    whole(node)?
));

/// A number of repetitions, 0 included.
pub(super) const REPEATS: Kind<usize> =
    kind!(Number, "0 to 1000", { "type": "integer", "minimum": 0, "maximum": 1000 }, |node| limits::steps(whole(node)?));

pub(super) const ELEMENTS: Kind<u64> = kind!(Number, "a whole number from 0", { "type": "integer", "minimum": 0, "maximum": u64::MAX }, |node| {
    limits::elements(whole(node)?)
});

pub(super) const PIXELS: Kind<i64> =
    kind!(Number, "pixels", { "type": "integer", "minimum": 1, "maximum": u32::MAX }, |node| limits::pixels(whole(node)?));

pub(super) const NOT_NEGATIVE: Kind<f64> =
    kind!(Number, "a number from 0", { "type": "number", "minimum": 0 }, |node| limits::not_negative(number(node)?));

/// A share, both ends included.
pub(super) const SHARE: Kind<f64> =
    kind!(Number, "from 0 to 1", { "type": "number", "minimum": 0, "maximum": 1 }, |node| limits::share(number(node)?));

pub(super) const SCHEDULER: Kind<String> = kind!(Text, "a sampler's name", { "type": "string", "pattern": "\\S" }, |node| {
    limits::scheduler(text(node)?)
});

/// A prompt, which may be empty.
pub(super) const PROMPT: Kind<String> = kind!(Text, "a text", { "type": "string" }, |node| match &node.value {
    Value::Text(prompt) if prompt.is_empty() => Ok(String::new()),
    Value::Null
    | Value::Boolean(_)
    | Value::Integer(_)
    | Value::Number(_)
    | Value::Text(_)
    | Value::List(_)
    | Value::Mapping(_) => limits::prompt(text(node)?),
});

/// A share of the weights.
pub(super) const SPARSITY: Kind<f64> = kind!(Number, "from 0 to below 1", { "type": "number", "minimum": 0, "exclusiveMaximum": 1 }, |node| {
    limits::target_sparsity(number(node)?)
});

pub(super) const MEAN_BITS: Kind<f64> = kind!(Number, "above 0, at most 16", { "type": "number", "exclusiveMinimum": 0, "maximum": 16 }, |node| {
    limits::target_bits(number(node)?)
});

/// A share in per cent, with its sign: a bare number could be meant as either.
pub(super) const PERCENTAGE: Kind<f64> = kind!(
    Text,
    "a percentage such as `0.5%`",
    { "type": "string", "pattern": "^\\s*[0-9.]+\\s*%\\s*$" },
    |node| match &node.value {
        Value::Text(text) => limits::percentage(text),
        Value::Null | Value::Boolean(_) | Value::Integer(_) | Value::Number(_) | Value::List(_) | Value::Mapping(_) => {
            Err(limits::PERCENTAGE.into())
        }
    }
);

pub(super) const DECIBELS: Kind<f64> = kind!(Number, "above 0, below 100", { "type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 100 }, |node| {
    limits::decibels(number(node)?)
});

/// A number of compressions.
pub(super) const SOLVES: Kind<usize> =
    kind!(Number, "1 to 100", { "type": "integer", "minimum": 1, "maximum": 100 }, |node| limits::solves(whole(node)?));

pub(super) const BIT_WIDTH: Kind<BitWidth> = Kind {
    read: |node| limits::n_bits(whole(node)?),
    values: || BitWidth::ALL.map(|width| width.to_string()).join(", "),
    schema: || json!({ "enum": BitWidth::ALL }),
    argument: Argument::Number,
};

pub(super) const VECTOR_LENGTH: Kind<usize> = kind!(Number, "1, 2, 4", { "enum": limits::VECTOR_LENGTHS }, |node| {
    limits::cluster_dim(whole(node)?)
});

pub(super) const AXIS: Kind<usize> = kind!(Number, "0, 1", { "enum": [0, 1] }, |node| limits::channel_axis(whole(node)?));

pub(super) const PATH: Kind<PathBuf> = kind!(Text, "a path", { "type": "string", "pattern": "\\S" }, |node| {
    text(node).map(PathBuf::from)
});

/// One LoRA, or a list of LoRAs.
pub(super) const LORAS: Kind<Vec<LoraFile>> = kind!(
    Item,
    "a list of files, each as `FILE` or `FILE:SCALE`",
    { "type": "array", "items": { "type": "string", "pattern": "\\S" } },
    |node| match &node.value {
        Value::List(list) => list
            .iter()
            .map(|entry| Ok(text(entry)?.parse().unwrap_or_else(|never: Infallible| match never {})))
            .collect(),
        Value::Null | Value::Boolean(_) | Value::Integer(_) | Value::Number(_) | Value::Text(_) | Value::Mapping(_) => {
            Err("must be a list of files".into())
        }
    }
);

/// One feed, or both.
pub(super) const FEEDS: Kind<Vec<Feed>> = kind!(
    Item,
    "a list of `diffusers`, `swift`",
    { "type": "array", "items": { "enum": ["diffusers", "swift"] }, "minItems": 1, "uniqueItems": true },
    |node| match &node.value {
        Value::List(list) => {
            let feeds: Vec<Feed> = list.iter().map(|entry| word(entry, &Feed::words())).collect::<Result<_, _>>()?;
            match feeds.as_slice() {
                [] => Err("must name a feed".into()),
                [first, rest @ ..] if rest.contains(first) => Err(format!("names `{}` twice", first.name())),
                _ => Ok(feeds),
            }
        }
        Value::Null | Value::Boolean(_) | Value::Integer(_) | Value::Number(_) | Value::Text(_) | Value::Mapping(_) => {
            Err("must be a list of `diffusers`, `swift`".into())
        }
    }
);

/// A regular expression for whole names.
pub(super) const PATTERN: Kind<String> = kind!(Text, "a regular expression", { "type": "string", "pattern": "\\S" }, |node| {
    let written = text(node)?;
    NamePattern::parse(written).map(|_| written.to_owned()).map_err(|why| format!("must be a regular expression: {why}"))
});

pub(super) const DEVICES: Kind<String> = kind!(
    Text,
    "`cpu`, `cuda`, `cuda:N`, `mps`",
    { "type": "string", "pattern": "^\\s*(cpu|cuda|cuda:[0-9]+|mps)\\s*(,\\s*(cpu|cuda|cuda:[0-9]+|mps)\\s*)*$" },
    |node| limits::device(text(node)?)
);

pub(super) const DTYPE: Kind<String> = kind!(
    Text,
    "`f32`, `f16`, `bf16`",
    { "enum": ["f32", "fp32", "float32", "f16", "fp16", "float16", "bf16", "bfloat16"] },
    |node| limits::dtype(text(node)?)
);

/// A size with its unit, or a number of bytes.
pub(super) const SIZE: Kind<u64> = kind!(
    Text,
    "a size such as `933MiB`",
    { "type": ["string", "integer"], "pattern": "^[0-9.]+ *([KMGT]iB|B)?$", "minimum": 1 },
    |node| match &node.value {
        Value::Integer(bytes) => limits::bytes(&bytes.to_string()),
        Value::Null
        | Value::Boolean(_)
        | Value::Number(_)
        | Value::Text(_)
        | Value::List(_)
        | Value::Mapping(_) => limits::bytes(text(node)?),
    }
);

/// `[2, 4]`, as coremltools writes it, or `2:4`.
pub(super) const RATIO: Kind<NmRatio> = kind!(
    Text,
    "`[n, m]` or `'n:m'`",
    {
        "type": ["array", "string"],
        "items": { "type": "integer", "minimum": 1 },
        "minItems": 2,
        "maxItems": 2,
        "pattern": "^\\s*[0-9]+\\s*:\\s*[0-9]+\\s*$"
    },
    |node| match &node.value {
        Value::Text(text) => limits::n_m_text(text),
        Value::List(pair) => match pair.as_slice() {
            [Node { value: Value::Integer(n), .. }, Node { value: Value::Integer(m), .. }] => limits::n_m_ratio(*n, *m),
            [_, _] => Err(limits::NM_RATIO.into()),
            _ => Err("must be a list of two numbers, such as [2, 4]".into()),
        },
        Value::Null | Value::Boolean(_) | Value::Integer(_) | Value::Number(_) | Value::Mapping(_) => {
            Err("must be a list of two numbers, such as [2, 4]".into())
        }
    }
);

/// A file of prompts, or a list of them whose entries are checked one by one.
pub(super) const PROMPTS: Kind<Node> = kind!(
    Text,
    "a file, or a list of prompts",
    { "type": ["string", "array"], "pattern": "\\S", "items": { "type": "string", "pattern": "\\S" }, "minItems": 1 },
    |node| match &node.value {
        Value::List(prompts) if prompts.is_empty() => Err("must list at least one prompt".into()),
        Value::Text(path) => limits::not_blank(path).map(|_| node.clone()),
        Value::List(_) => Ok(node.clone()),
        Value::Null | Value::Boolean(_) | Value::Integer(_) | Value::Number(_) | Value::Mapping(_) => {
            Err("must be a file or a list of prompts".into())
        }
    }
);

/// Regular expressions, which are checked one by one.
pub(super) const PATTERNS: Kind<Vec<Node>> = kind!(
    Text,
    "a list of regular expressions",
    { "type": "array", "items": { "type": "string", "pattern": "\\S" }, "minItems": 1 },
    |node| match &node.value {
        Value::List(patterns) if patterns.is_empty() => Err("must name at least one stage".into()),
        Value::List(patterns) => Ok(patterns.clone()),
        Value::Null
        | Value::Boolean(_)
        | Value::Integer(_)
        | Value::Number(_)
        | Value::Text(_)
        | Value::Mapping(_) => Err("must be a list of regular expressions".into()),
    }
);
