//! `vocab.json` and `merges.txt` as Apple's tokenizer reads them.
//!
//! `BPETokenizer+Reading.swift`: a merge's rank is the number of its line, among lines that are not
//! empty and do not begin with `#`; each has exactly two tokens with a space between them; a last
//! line without an end is dropped.

use sdxl_model::text::{BytePairs, ClipTokenizer};
use sdxl_pipeline::PipelineFolder;
use squeeze_base::error::{Error, Result};
use squeeze_base::shorten::shorten;

/// The content of the two files.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Vocabulary {
    pub tokens: String,
    pub merges: String,
}

/// The tokens that Apple's tokenizer looks up by their texts.
const BEGIN: &str = "<|startoftext|>";
const END: &str = "<|endoftext|>";

/// The padding of each tokenizer, which Apple's pipeline does not read from a file.
fn padding(tokenizer: &str) -> &'static str {
    if tokenizer == "tokenizer_2" { "!" } else { END }
}

/// The files for the tokenizers of a pipeline, which Apple's pipeline reads once for both encoders.
///
/// # Errors
/// [`Error::Argument`] if the tokenizers differ, or pad or frame texts in another way than Apple's
/// pipeline; [`Error::BadFile`] if they cannot be read, or are no byte-pair encodings.
pub(super) fn of(model: &PipelineFolder) -> Result<Vocabulary> {
    let mut first: Option<BytePairs> = None;
    for part in &model.text_encoders {
        let tokenizer = model.tokenizer(part)?;
        let pairs = tokenizer.byte_pairs()?;
        check_specials(part.tokenizer, &tokenizer, &pairs)?;
        match &first {
            Some(first) if *first != pairs => {
                return Err(Error::Argument(
                    "the tokenizers of the two text encoders differ, and Apple's pipeline reads one vocabulary for both".into(),
                ));
            }
            Some(_) => {}
            None => first = Some(pairs),
        }
    }
    let pairs = first.ok_or_else(|| Error::internal("a pipeline without text encoders was opened"))?;
    Ok(Vocabulary { tokens: tokens(&pairs), merges: merges(&pairs)? })
}

/// Checks the tokens before, after and behind a text.
fn check_specials(name: &str, tokenizer: &ClipTokenizer, pairs: &BytePairs) -> Result<()> {
    let ids = tokenizer.encode("")?.ids;
    let pad = padding(name);
    // An empty text is a begin, an end and padding.
    for (role, text, at) in [("begins texts", BEGIN, 0), ("ends texts", END, 1), ("pads texts", pad, ids.len() - 1)] {
        let id = pairs.tokens.iter().find(|(token, _)| token == text).map(|(_, id)| i64::from(*id));
        if id.is_none() || ids.get(at).copied() != id {
            return Err(Error::Argument(format!("Apple's pipeline {role} with `{text}`, and {name} does not")));
        }
    }
    Ok(())
}

/// `vocab.json`, in the order of the ids.
fn tokens(pairs: &BytePairs) -> String {
    let entries = pairs.tokens.iter().map(|(token, id)| format!("{}:{id}", serde_json::Value::from(token.as_str())));
    format!("{{{}}}\n", entries.collect::<Vec<_>>().join(","))
}

/// `merges.txt`.
fn merges(pairs: &BytePairs) -> Result<String> {
    let mut text = "#version: 0.2\n".to_owned();
    for (first, second) in &pairs.merges {
        if [first, second].into_iter().any(|token| token.is_empty() || token.contains([' ', '\n', '\r'])) {
            let merge = shorten(&format!("{first} {second}"));
            return Err(Error::Argument(format!("the merge `{merge}` is not two tokens for Apple's tokenizer")));
        }
        text.push_str(&format!("{first} {second}\n"));
    }
    // Apple's tokenizer takes these lines for comments.
    let lost = pairs.merges.iter().filter(|(first, _)| first.starts_with('#')).count();
    if lost > 0 {
        tracing::info!("Apple's tokenizer skips {lost} merges that begin with `#`; in its own files too");
    }
    Ok(text)
}
