//! CLIP's tokenizer: from text to 77 ids.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::Value;
use squeeze_base::error::{Error, Result};
use squeeze_base::input::{self, Limit};
use squeeze_base::shorten::shorten;
use tokenizers::models::bpe::{BPE, Merges, Vocab};
use tokenizers::normalizers::{Lowercase, NFC, Replace, Sequence as NormalizerSequence};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence as PreTokenizerSequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{SplitDelimiterBehavior, Tokenizer};

use super::added_tokens::{Frame, Settings, of_several_vectors};
use super::side::{Side, Sides};
use super::vocabulary;
use crate::checkpoint::ConfigFile;

/// A byte-pair tokenizer that puts a begin and an end token around a text, truncates it to a fixed
/// length and pads it, as `transformers.CLIPTokenizer` does for diffusers
/// (`padding="max_length", truncation=True`).
#[derive(Debug)]
pub struct ClipTokenizer {
    tokenizer: Tokenizer,
    folder: PathBuf,
    begin: i64,
    end: i64,
    pad: i64,
    length: usize,
    sides: Sides,
    /// One more than the highest id of the vocabulary, without added tokens.
    base: i64,
    /// Added tokens of several vectors, and the texts of their vectors.
    vectors: BTreeMap<String, String>,
    /// The ids from here on have no embedding.
    embeddings: i64,
}

/// A text as ids.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tokens {
    /// The ids, exactly as many as the encoder has positions.
    pub ids: Vec<i64>,
    /// The end of the text, if it did not fit.
    pub dropped: Option<String>,
}

/// A byte-pair encoding, as `vocab.json` and `merges.txt` hold it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BytePairs {
    /// The tokens, special ones included, with their ids: in the order of the ids.
    pub tokens: Vec<(String, u32)>,
    /// The pairs that are merged, the first ones first.
    pub merges: Vec<(String, String)>,
}

/// The two forms of a merge in `tokenizer.json`: files of newer releases have lists.
#[derive(Deserialize)]
#[serde(untagged)]
enum Merge {
    Pair(String, String),
    Line(String),
}

impl ClipTokenizer {
    /// Reads a tokenizer folder: `tokenizer.json`, or `vocab.json` with `merges.txt`; and
    /// `special_tokens_map.json`, `tokenizer_config.json` and `added_tokens.json` where there are
    /// any. Padding and truncation that `tokenizer.json` keeps from its last use do not count,
    /// except for their sides.
    ///
    /// # Errors
    /// If neither kind is there, a file is damaged, or a special token is not in the vocabulary.
    pub fn open(folder: &Path) -> Result<Self> {
        let whole = folder.join("tokenizer.json");
        if !whole.exists() {
            return Self::with_settings(from_vocab_and_merges(folder)?, folder, Settings::read(folder, None)?);
        }
        let content = input::read(&whole, Limit::TOKENIZER)?;
        let mut json: Value = serde_json::from_slice(&content).map_err(|source| Error::Json { path: whole.clone(), source })?;
        let list = json.get_mut("added_tokens").map(|list| std::mem::replace(list, Value::Array(Vec::new())));
        let mut settings = Settings::read(folder, list)?;
        settings.sides = settings.sides.or_of(&json);
        for key in ["padding", "truncation"] {
            if let Some(kept) = json.get_mut(key) {
                *kept = Value::Null;
            }
        }
        let tokenizer = Tokenizer::from_bytes(json.to_string()).map_err(|why| Error::bad_file(&whole, why.to_string()))?;
        Self::with_settings(tokenizer, folder, settings)
    }

    /// CLIP's own tokenizer, whose vocabulary this library has. `pad` is the padding token, which
    /// differs between SDXL's two tokenizers.
    ///
    /// # Errors
    /// [`Error::Internal`] if the library's own files are damaged.
    pub fn shipped(pad: &str) -> Result<Self> {
        let folder = Path::new(vocabulary::NAME);
        let (vocab, merges) = (vocabulary::vocab()?, vocabulary::merges()?);
        let tokenizer = bpe(vocab, merges).map_err(|why| Error::internal(format!("CLIP's vocabulary: {why}")))?;
        let specials = vocabulary::special_tokens(pad).as_object().cloned().unwrap_or_default();
        Self::with_settings(tokenizer, folder, Settings::of_specials(ConfigFile::from_entries(folder, specials))?)
    }

    fn with_settings(mut tokenizer: Tokenizer, folder: &Path, settings: Settings) -> Result<Self> {
        let (length, sides) = (settings.length, settings.sides);
        let base = tokenizer.get_vocab(false).values().copied().max().map_or(0, |id| i64::from(id) + 1);
        let Frame { begin, end, pad } = settings.add_to(&mut tokenizer, folder)?;
        let vectors = of_several_vectors(&tokenizer);
        let embeddings = i64::MAX;
        Ok(ClipTokenizer { tokenizer, folder: folder.to_owned(), begin, end, pad, length, sides, base, vectors, embeddings })
    }

    /// The tokenizer that refuses texts with an id from `embeddings` on. Tokens may have been added
    /// to a tokenizer whose text encoder was not given embeddings for them: that is no fault until
    /// a prompt has one.
    #[must_use]
    pub fn for_embeddings(self, embeddings: i64) -> Self {
        ClipTokenizer { embeddings, ..self }
    }

    /// The number of ids that a text becomes.
    pub fn length(&self) -> usize {
        self.length
    }

    /// One more than the highest id of the vocabulary, without tokens that were added to it.
    pub fn vocabulary(&self) -> i64 {
        self.base
    }

    /// The tokens and merges, from whichever files the tokenizer was read.
    ///
    /// # Errors
    /// [`Error::BadFile`] if the tokenizer is no byte-pair encoding.
    pub fn byte_pairs(&self) -> Result<BytePairs> {
        let wrong = |why: &str| Error::bad_file(&self.folder, format!("the tokenizer is no byte-pair encoding: {why}"));
        let model = serde_json::to_value(self.tokenizer.get_model()).map_err(|why| wrong(&why.to_string()))?;
        let merges = model.get("merges").ok_or_else(|| wrong("it has no merges"))?;
        let merges: Vec<Merge> = serde_json::from_value(merges.clone()).map_err(|why| wrong(&why.to_string()))?;
        let pair = |merge: Merge| match merge {
            Merge::Pair(first, second) => Ok((first, second)),
            Merge::Line(line) => {
                let (first, second) = line.split_once(' ').ok_or_else(|| wrong("a merge is not two tokens"))?;
                Ok((first.to_owned(), second.to_owned()))
            }
        };
        let merges = merges.into_iter().map(pair).collect::<Result<_>>()?;
        let mut tokens: Vec<(String, u32)> = self.tokenizer.get_vocab(true).into_iter().collect();
        tokens.sort_by(|a, b| a.1.cmp(&b.1).then_with(|| a.0.cmp(&b.0)));
        Ok(BytePairs { tokens, merges })
    }

    /// Turns a text into ids.
    ///
    /// # Errors
    /// If the `tokenizers` crate refuses the text, or the text has a token without an embedding.
    pub fn encode(&self, text: &str) -> Result<Tokens> {
        let ids = self.ids(text)?;
        let room = self.length - 2;
        let (kept, cut) = match self.sides.truncation {
            Some(Side::Left) => {
                let (cut, kept) = ids.split_at(ids.len().saturating_sub(room));
                (kept, cut)
            }
            Some(Side::Right) | None => ids.split_at(ids.len().min(room)),
        };
        let dropped = if cut.is_empty() {
            None
        } else {
            let end = self.tokenizer.decode(cut, false).map_err(|why| self.refused(text, &why))?;
            Some(end.replace("</w>", " ").trim().to_owned())
        };
        Ok(Tokens { ids: self.framed(kept), dropped })
    }

    /// Turns a text into as many pieces as it needs, each with a begin and an end of its own. A
    /// text that fits is one piece, and so is an empty one.
    ///
    /// # Errors
    /// As [`encode`](Self::encode).
    pub fn pieces(&self, text: &str) -> Result<Vec<Vec<i64>>> {
        let ids = self.ids(text)?;
        if ids.is_empty() {
            return Ok(vec![self.framed(&[])]);
        }
        Ok(ids.chunks(self.length - 2).map(|piece| self.framed(piece)).collect())
    }

    /// The ids of a text, in which tokens of several vectors are replaced by all of their vectors.
    fn ids(&self, text: &str) -> Result<Vec<u32>> {
        let encoded = |text: &str| self.tokenizer.encode(text, false).map_err(|why| self.refused(text, &why));
        let mut encoding = encoded(text)?;
        if !self.vectors.is_empty() {
            let mut converted = text.to_owned();
            let mut seen: Vec<&str> = Vec::new();
            for token in encoding.get_tokens() {
                if let Some(vectors) = self.vectors.get(token)
                    && !seen.contains(&token.as_str())
                {
                    converted = converted.replace(token, vectors);
                    seen.push(token);
                }
            }
            if !seen.is_empty() {
                encoding = encoded(&converted)?;
            }
        }
        if let Some((id, token)) =
            encoding.get_ids().iter().zip(encoding.get_tokens()).find(|(id, _)| i64::from(**id) >= self.embeddings)
        {
            let problem = format!(
                "the token `{}` has the id {id}, but its text encoder has {} embeddings; use the text encoder that was saved with this \
                 tokenizer, or leave the token out of the prompt",
                shorten(token),
                self.embeddings
            );
            return Err(Error::bad_file(&self.folder, problem));
        }
        Ok(encoding.get_ids().to_vec())
    }

    /// Ids between a begin and an end, padded.
    fn framed(&self, ids: &[u32]) -> Vec<i64> {
        let mut framed = vec![self.begin];
        framed.extend(ids.iter().map(|id| i64::from(*id)));
        framed.push(self.end);
        let padding = self.length.saturating_sub(framed.len());
        framed.resize(self.length, self.pad);
        if self.sides.padding == Some(Side::Left) {
            framed.rotate_right(padding);
        }
        framed
    }

    fn refused(&self, text: &str, why: &tokenizers::Error) -> Error {
        Error::bad_file(&self.folder, format!("cannot tokenize `{}`: {why}", shorten(text)))
    }
}

/// The tokenizer that `transformers.CLIPTokenizer` builds from the two older files.
fn from_vocab_and_merges(folder: &Path) -> Result<Tokenizer> {
    let (vocab, merges) = (folder.join("vocab.json"), folder.join("merges.txt"));
    for path in [&vocab, &merges] {
        if !path.exists() {
            return Err(Error::bad_file(folder, "has neither tokenizer.json nor vocab.json and merges.txt"));
        }
    }
    let (vocab, merges) = (read_vocab(&vocab)?, read_merges(&merges)?);
    bpe(vocab, merges).map_err(|why| Error::bad_file(folder, format!("vocab.json and merges.txt: {why}")))
}

/// CLIP's byte-pair encoding of lower-case words.
fn bpe(vocab: Vocab, merges: Merges) -> tokenizers::Result<Tokenizer> {
    let model = BPE::builder()
        .vocab_and_merges(vocab, merges)
        .unk_token("<|endoftext|>".into())
        .continuing_subword_prefix(String::new())
        .end_of_word_suffix("</w>".into())
        .build()?;
    let words = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+";
    let split = Split::new(SplitPattern::Regex(words.into()), SplitDelimiterBehavior::Removed, true)?;
    let spaces = Replace::new(tokenizers::normalizers::replace::ReplacePattern::Regex(r"\s+".into()), " ")?;
    let mut tokenizer = Tokenizer::new(model);
    tokenizer.with_normalizer(Some(NormalizerSequence::new(vec![NFC.into(), spaces.into(), Lowercase.into()])));
    tokenizer.with_pre_tokenizer(Some(PreTokenizerSequence::new(vec![
        split.into(),
        ByteLevel::default().add_prefix_space(false).into(),
    ])));
    tokenizer.with_decoder(Some(ByteLevel::default()));
    Ok(tokenizer)
}

/// `vocab.json`: each token's id.
fn read_vocab(path: &Path) -> Result<Vocab> {
    let mut vocab = Vocab::new();
    for (token, id) in ConfigFile::read_within(path, Limit::TOKENIZER)?.into_entries() {
        match id.as_u64().and_then(|id| u32::try_from(id).ok()) {
            Some(id) => vocab.insert(token, id),
            None => return Err(Error::bad_file(path, format!("`{}` has no id", shorten(&token)))),
        };
    }
    Ok(vocab)
}

/// `merges.txt`: two tokens per line, separated by a space, in the order of merging.
fn read_merges(path: &Path) -> Result<Merges> {
    let text = input::read_text(path, Limit::TOKENIZER)?;
    let merge = |line: &str| match line.split(' ').collect::<Vec<_>>()[..] {
        [first, second] => Ok((first.to_owned(), second.to_owned())),
        _ => Err(Error::bad_file(path, format!("`{}` is not two tokens", shorten(line)))),
    };
    text.lines().filter(|line| !line.starts_with("#version")).map(merge).collect()
}
