//! The sides on which a text is padded and cut.

use serde_json::Value;
use squeeze_base::error::Result;

use crate::checkpoint::ConfigFile;

/// One of the two sides of a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    Left,
    Right,
}

impl Side {
    fn named(name: &str) -> Option<Self> {
        match name.to_lowercase().as_str() {
            "left" => Some(Side::Left),
            "right" => Some(Side::Right),
            _ => None,
        }
    }
}

/// The sides on which texts are padded and cut; `None` where a file does not say it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Sides {
    pub padding: Option<Side>,
    pub truncation: Option<Side>,
}

impl Sides {
    /// Takes `padding_side` and `truncation_side` of a `tokenizer_config.json`.
    pub(super) fn read(config: &mut ConfigFile) -> Result<Self> {
        let mut side = |key: &str| -> Result<Option<Side>> {
            let Some(name) = config.optional::<String>(key)? else { return Ok(None) };
            Side::named(&name).map(Some).ok_or_else(|| config.error(key, format!("= {name:?} is neither `left` nor `right`")))
        };
        Ok(Sides { padding: side("padding_side")?, truncation: side("truncation_side")? })
    }

    /// The sides that the settings `padding` and `truncation` of a `tokenizer.json` give, which
    /// count where `self` is silent. All else of these settings is that of the last call before the
    /// file was saved, and every call of diffusers sets it anew.
    pub(super) fn or_of(self, json: &Value) -> Self {
        let side = |key: &str| json.get(key)?.get("direction")?.as_str().and_then(Side::named);
        Sides { padding: self.padding.or(side("padding")), truncation: self.truncation.or(side("truncation")) }
    }
}
