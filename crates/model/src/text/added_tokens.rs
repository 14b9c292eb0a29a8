//! Tokens beside a tokenizer's vocabulary, as textual inversion adds them, and special tokens.
//!
//! The order and the precedence of the files are those of
//! `PreTrainedTokenizerBase._from_pretrained` and `TokenizersBackend.__init__` in transformers
//! 5.23.0. As there, a token that the vocabulary lacks gets the next free id, whatever id its file
//! gives it.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;
use serde_json::Value;
use squeeze_base::error::{Error, Result};
use squeeze_base::input::Limit;
use squeeze_base::shorten::shorten;
use tokenizers::{AddedToken, Tokenizer};

use super::side::Sides;
use crate::checkpoint::ConfigFile;

/// A special token: its text, or a record with flags.
#[derive(Deserialize, Clone)]
#[serde(untagged)]
enum SpecialToken {
    Text(String),
    Record(Record),
}

/// A token with flags. Absent flags have transformers' defaults.
#[derive(Deserialize, Clone)]
struct Record {
    content: String,
    #[serde(default)]
    lstrip: bool,
    #[serde(default)]
    rstrip: bool,
    #[serde(default)]
    single_word: bool,
    normalized: Option<bool>,
    #[serde(default)]
    special: bool,
}

impl Record {
    fn added(self) -> AddedToken {
        let Record { content, lstrip, rstrip, single_word, normalized, special } = self;
        let token = AddedToken::from(content, special).lstrip(lstrip).rstrip(rstrip).single_word(single_word);
        match normalized {
            Some(normalized) => token.normalized(normalized),
            None => token,
        }
    }
}

impl SpecialToken {
    fn content(&self) -> &str {
        match self {
            SpecialToken::Text(content) | SpecialToken::Record(Record { content, .. }) => content,
        }
    }

    fn added(self) -> AddedToken {
        match self {
            SpecialToken::Text(content) => AddedToken::from(content, true),
            SpecialToken::Record(record) => Record { special: true, ..record }.added(),
        }
    }
}

/// The roles of special tokens, in the order in which transformers adds them, with CLIP's defaults.
const ROLES: [(&str, Option<&str>); 7] = [
    ("bos_token", Some("<|startoftext|>")),
    ("eos_token", Some("<|endoftext|>")),
    ("unk_token", Some("<|endoftext|>")),
    ("sep_token", None),
    ("pad_token", Some("<|endoftext|>")),
    ("cls_token", None),
    ("mask_token", None),
];

/// A tokenizer's settings: its special tokens, its added tokens, its length.
pub(super) struct Settings {
    roles: Vec<(&'static str, SpecialToken)>,
    /// Further special tokens (`additional_special_tokens`, `extra_special_tokens`).
    extra: Vec<SpecialToken>,
    /// Added tokens by the id that their file gives them.
    added: BTreeMap<u32, AddedToken>,
    /// The number of ids that a text becomes.
    pub length: usize,
    /// The sides on which texts are padded and cut, where `tokenizer_config.json` says it.
    pub sides: Sides,
}

/// The ids of the tokens that frame a text.
pub(super) struct Frame {
    pub begin: i64,
    pub end: i64,
    pub pad: i64,
}

impl Settings {
    /// Reads the settings of the tokenizer in `folder`; `of_json` is the list `added_tokens` of its
    /// `tokenizer.json`.
    pub(super) fn read(folder: &Path, of_json: Option<Value>) -> Result<Self> {
        let existing = |name: &str| Some(folder.join(name)).filter(|path| path.exists());
        let read = |name: &str| existing(name).map(|path| ConfigFile::read(&path)).transpose();
        let legacy = existing("added_tokens.json").map(|path| ConfigFile::read_within(&path, Limit::TOKENIZER)).transpose()?;
        Self::of_files(read("tokenizer_config.json")?, read("special_tokens_map.json")?, legacy, of_json, folder)
    }

    /// The settings that `specials`, a `special_tokens_map.json`, makes alone.
    pub(super) fn of_specials(specials: ConfigFile) -> Result<Self> {
        let folder = specials.path().to_owned();
        Self::of_files(None, Some(specials), None, None, &folder)
    }

    fn of_files(
        config: Option<ConfigFile>,
        specials: Option<ConfigFile>,
        legacy: Option<ConfigFile>,
        of_json: Option<Value>,
        folder: &Path,
    ) -> Result<Self> {
        let mut config = config.unwrap_or_else(|| ConfigFile::from_entries(folder, serde_json::Map::new()));
        let decoder = config.optional::<BTreeMap<u32, Record>>("added_tokens_decoder")?;
        // With a list of its own, the config alone counts.
        let mut specials = specials.filter(|_| decoder.is_none());
        let mut roles = Vec::new();
        for (role, default) in ROLES {
            let of_map = specials.as_mut().map(|file| file.optional(role)).transpose()?.flatten();
            let of_config = config.optional(role)?;
            let default = default.map(|content| SpecialToken::Text(content.to_owned()));
            roles.extend(of_map.or(of_config).or(default).map(|token| (role, token)));
        }
        let mut extra = listed(&mut config, "extra_special_tokens")?;
        let former = listed(&mut config, "additional_special_tokens")?;
        if extra.is_empty() {
            extra = former;
        }
        if let Some(file) = &mut specials {
            extra.extend(listed(file, "extra_special_tokens")?);
        }
        // The tokens under the former name in `special_tokens_map.json` are not special in
        // `added_tokens.json`: transformers reads them later.
        let known = extra.len();
        if let Some(file) = &mut specials {
            let former = listed(file, "additional_special_tokens")?;
            extra.extend(former.into_iter().filter(|_| known == 0));
        }
        let length = length(&mut config, specials.as_mut())?;
        let sides = Sides::read(&mut config)?;
        let mut added: BTreeMap<u32, AddedToken> = BTreeMap::new();
        match decoder {
            Some(decoder) => added.extend(decoder.into_iter().map(|(id, token)| (id, token.added()))),
            None => {
                if let Some(legacy) = legacy {
                    let path = legacy.path().to_owned();
                    for (content, id) in legacy.into_entries() {
                        let id = id.as_u64().and_then(|id| u32::try_from(id).ok());
                        let id = id.ok_or_else(|| Error::bad_file(&path, format!("`{}` has no id", shorten(&content))))?;
                        let all = roles.iter().map(|(_, token)| token).chain(&extra[..known]);
                        let is_special = all.map(SpecialToken::content).any(|special| special == content);
                        added.insert(id, AddedToken::from(content, is_special));
                    }
                }
                added.extend(of_tokenizer_json(of_json, folder)?);
            }
        }
        Ok(Settings { roles, extra, added, length, sides })
    }

    /// Adds the tokens to `tokenizer`. A token whose id is not the one of its file is a warning.
    ///
    /// # Errors
    /// [`Error::BadFile`] if begin, end or padding is not a token.
    pub(super) fn add_to(self, tokenizer: &mut Tokenizer, folder: &Path) -> Result<Frame> {
        for (role, token) in &self.roles {
            let content = token.content();
            let is_listed = self.added.values().any(|added| added.content == content);
            if !is_listed && tokenizer.token_to_id(content).is_none() {
                return Err(Error::bad_file(folder, format!("the vocabulary does not have the {role} `{}`", shorten(content))));
            }
        }
        let is_role = |content: &str| self.roles.iter().any(|(_, token)| token.content() == content);
        let mut tokens: Vec<AddedToken> = self.added.values().cloned().collect();
        for token in &mut tokens {
            token.special |= is_role(&token.content);
        }
        let others = self.roles.iter().map(|(_, token)| token).chain(&self.extra);
        let others = others.filter(|token| self.added.values().all(|added| added.content != token.content()));
        let mut special: Vec<AddedToken> = Vec::new();
        for token in others.cloned().map(SpecialToken::added) {
            // One text can have two roles ("<|endoftext|>" is both end and padding). As in
            // transformers, the flags of the last role are used.
            special.retain(|earlier| earlier.content != token.content);
            special.push(token);
        }
        tokens.extend(special);
        // Special tokens are cut out of the text before any other processing, the padding token
        // included. Where the padding token is "!", as in SDXL's second tokenizer, every "!" of a
        // prompt therefore becomes padding, as it did when the models were trained.
        tokenizer.add_tokens(&tokens);
        for (id, token) in &self.added {
            if tokenizer.token_to_id(&token.content) != Some(*id) {
                tracing::warn!(
                    "{}: the added token `{}` is said to have the id {id}; like transformers, this program takes {}",
                    folder.display(),
                    shorten(&token.content),
                    tokenizer.token_to_id(&token.content).map_or("none".to_owned(), |id| id.to_string()),
                );
            }
        }
        let id = |role: &str| -> Result<i64> {
            let found = self.roles.iter().find(|(name, _)| *name == role);
            let id = found.and_then(|(_, token)| tokenizer.token_to_id(token.content()));
            id.map(i64::from).ok_or_else(|| Error::internal(format!("the {role} is not a token")))
        };
        Ok(Frame { begin: id("bos_token")?, end: id("eos_token")?, pad: id("pad_token")? })
    }
}

/// The tokens of a list, or of a record of named tokens.
fn listed(file: &mut ConfigFile, key: &str) -> Result<Vec<SpecialToken>> {
    match file.optional::<Value>(key)? {
        None => Ok(Vec::new()),
        Some(value) => {
            let tokens = match value {
                Value::Object(named) => Value::Array(named.into_iter().map(|(_, token)| token).collect()),
                other => other,
            };
            let shown = shorten(&tokens.to_string());
            serde_json::from_value(tokens).map_err(|_| file.error(key, format!("= {shown} is not a list of tokens")))
        }
    }
}

/// The list `added_tokens` of a `tokenizer.json`.
fn of_tokenizer_json(list: Option<Value>, folder: &Path) -> Result<Vec<(u32, AddedToken)>> {
    #[derive(Deserialize)]
    struct Entry {
        id: u32,
        #[serde(flatten)]
        token: Record,
    }
    let Some(list) = list else { return Ok(Vec::new()) };
    let bad = |why: serde_json::Error| Error::bad_file(&folder.join("tokenizer.json"), format!("added_tokens: {why}"));
    let entries: Vec<Entry> = serde_json::from_value(list).map_err(bad)?;
    Ok(entries.into_iter().map(|entry| (entry.id, entry.token.added())).collect())
}

/// The number of ids that a text becomes.
fn length(config: &mut ConfigFile, specials: Option<&mut ConfigFile>) -> Result<usize> {
    const CLIP: usize = 77;
    for file in [specials, Some(config)].into_iter().flatten() {
        if let Some(value) = file.optional::<Value>("model_max_length")? {
            // Some files have 1e30 for an unknown length.
            return match value.as_f64() {
                Some(length) if length >= 1e6 => Ok(CLIP),
                Some(length) if length >= 3.0 && length.fract() == 0.0 => Ok(length as usize),
                _ => Err(file.error("model_max_length", format!("= {value} is not a number of tokens"))),
            };
        }
    }
    Ok(CLIP)
}

/// The texts of several vectors: of each added token `x` for which there are `x_1`, `x_2`, …, all
/// of them separated by spaces, by which diffusers replaces `x` in a prompt
/// (`TextualInversionLoaderMixin._maybe_convert_prompt`).
pub(super) fn of_several_vectors(tokenizer: &Tokenizer) -> BTreeMap<String, String> {
    let added: BTreeMap<String, u32> =
        tokenizer.get_added_tokens_decoder().into_iter().map(|(id, token)| (token.content, id)).collect();
    let vectors = |token: &String| {
        let more: Vec<String> =
            (1..).map(|number| format!("{token}_{number}")).take_while(|name| added.contains_key(name)).collect();
        (!more.is_empty()).then(|| (token.clone(), format!("{token} {}", more.join(" "))))
    };
    added.keys().filter_map(vectors).collect()
}
