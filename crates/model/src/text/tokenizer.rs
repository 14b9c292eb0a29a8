//! CLIP's tokenizer: from text to 77 ids.

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
use tokenizers::{AddedToken, SplitDelimiterBehavior, Tokenizer};

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

/// A special token in `special_tokens_map.json`: its text, or a record with flags.
#[derive(Deserialize)]
#[serde(untagged)]
enum SpecialToken {
    Text(String),
    Record {
        content: String,
        #[serde(default)]
        lstrip: bool,
        #[serde(default)]
        rstrip: bool,
        #[serde(default)]
        single_word: bool,
        #[serde(default)]
        normalized: bool,
    },
}

impl SpecialToken {
    fn added(self) -> AddedToken {
        match self {
            SpecialToken::Text(content) => AddedToken::from(content, true).normalized(false),
            SpecialToken::Record { content, lstrip, rstrip, single_word, normalized } => {
                AddedToken::from(content, true).lstrip(lstrip).rstrip(rstrip).single_word(single_word).normalized(normalized)
            }
        }
    }
}

impl ClipTokenizer {
    /// Reads a tokenizer folder: `tokenizer.json`, or `vocab.json` with `merges.txt`; and
    /// `special_tokens_map.json` and `tokenizer_config.json` where there are any.
    ///
    /// # Errors
    /// If neither kind is there, a file is damaged, or a special token is not in the vocabulary.
    pub fn open(folder: &Path) -> Result<Self> {
        let bad = |name: &str, why: tokenizers::Error| Error::bad_file(&folder.join(name), why.to_string());
        let whole = folder.join("tokenizer.json");
        let tokenizer = if whole.exists() {
            Tokenizer::from_bytes(input::read(&whole, Limit::TOKENIZER)?).map_err(|why| bad("tokenizer.json", why))?
        } else {
            from_vocab_and_merges(folder)?
        };
        Self::with_specials(tokenizer, folder, Specials::read(folder)?)
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
        Self::with_specials(tokenizer, folder, Specials(vec![ConfigFile::from_entries(folder, specials)]))
    }

    fn with_specials(mut tokenizer: Tokenizer, folder: &Path, mut specials: Specials) -> Result<Self> {
        let mut added: Vec<AddedToken> = Vec::new();
        let mut special = |name: &str, default: &str| -> Result<i64> {
            let token = specials.take(name)?.unwrap_or(SpecialToken::Text(default.to_owned())).added();
            let id = tokenizer
                .token_to_id(&token.content)
                .ok_or_else(|| Error::bad_file(folder, format!("the vocabulary does not have the {name} `{}`", token.content)))?;
            // One text can have two roles ("<|endoftext|>" is both end and padding). As in
            // transformers, the flags of the last role are used.
            added.retain(|earlier| earlier.content != token.content);
            added.push(token);
            Ok(i64::from(id))
        };
        let begin = special("bos_token", "<|startoftext|>")?;
        let end = special("eos_token", "<|endoftext|>")?;
        special("unk_token", "<|endoftext|>")?;
        let pad = special("pad_token", "<|endoftext|>")?;
        // Special tokens are cut out of the text before any other processing, the padding token
        // included. Where the padding token is "!", as in SDXL's second tokenizer, every "!" of a
        // prompt therefore becomes padding, as it did when the models were trained.
        tokenizer.add_special_tokens(&added);
        let length = specials.length()?;
        Ok(ClipTokenizer { tokenizer, folder: folder.to_owned(), begin, end, pad, length })
    }

    /// The number of ids that a text becomes.
    pub fn length(&self) -> usize {
        self.length
    }

    /// One more than the highest id of the vocabulary.
    pub fn vocabulary(&self) -> i64 {
        let highest = self.tokenizer.get_vocab(true).values().copied().max();
        highest.map_or(0, |id| i64::from(id) + 1)
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
    /// If the `tokenizers` crate refuses the text.
    pub fn encode(&self, text: &str) -> Result<Tokens> {
        let refused = |why| self.refused(text, &why);
        let encoding = self.tokenizer.encode(text, false).map_err(refused)?;
        let (kept, cut) = encoding.get_ids().split_at(encoding.len().min(self.length - 2));
        let dropped = if cut.is_empty() {
            None
        } else {
            let end = self.tokenizer.decode(cut, false).map_err(refused)?;
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
        let encoding = self.tokenizer.encode(text, false).map_err(|why| self.refused(text, &why))?;
        let ids = encoding.get_ids();
        if ids.is_empty() {
            return Ok(vec![self.framed(&[])]);
        }
        Ok(ids.chunks(self.length - 2).map(|piece| self.framed(piece)).collect())
    }

    /// Ids between a begin and an end, padded.
    fn framed(&self, ids: &[u32]) -> Vec<i64> {
        let mut framed = vec![self.begin];
        framed.extend(ids.iter().map(|id| i64::from(*id)));
        framed.push(self.end);
        framed.resize(self.length, self.pad);
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

/// `tokenizer_config.json` and `special_tokens_map.json`, of which the second takes precedence.
struct Specials(Vec<ConfigFile>);

impl Specials {
    fn read(folder: &Path) -> Result<Self> {
        let files = ["special_tokens_map.json", "tokenizer_config.json"].map(|name| folder.join(name));
        Ok(Specials(files.iter().filter(|path| path.exists()).map(|path| ConfigFile::read(path)).collect::<Result<_>>()?))
    }

    fn take(&mut self, key: &str) -> Result<Option<SpecialToken>> {
        for file in &mut self.0 {
            if let Some(token) = file.optional(key)? {
                return Ok(Some(token));
            }
        }
        Ok(None)
    }

    fn length(&mut self) -> Result<usize> {
        const CLIP: usize = 77;
        for file in &mut self.0 {
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
}
