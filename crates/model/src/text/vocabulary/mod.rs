//! CLIP's vocabulary, for checkpoints that come without one.
//!
//! `merges.txt.gz` has the 48,894 merges of OpenAI's `bpe_simple_vocab_16e6.txt.gz` that CLIP uses
//! (MIT licence, see `LICENSE`). The tokens follow from them as in `simple_tokenizer.py` of
//! <https://github.com/openai/CLIP>.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::Path;

use flate2::read::GzDecoder;
use serde_json::{Value, json};
use squeeze_base::error::{Error, Result};
use tokenizers::models::bpe::{Merges, Vocab};

/// The name of the vocabulary in messages.
pub const NAME: &str = "CLIP's vocabulary";

const MERGES: &[u8] = include_bytes!("merges.txt.gz");
const BEGIN: &str = "<|startoftext|>";
const END: &str = "<|endoftext|>";

/// The padding token of SDXL's tokenizer `name`, `tokenizer` or `tokenizer_2`.
#[must_use]
pub fn padding(name: &str) -> &'static str {
    if name == "tokenizer_2" { "!" } else { END }
}

fn text() -> Result<String> {
    let mut text = String::new();
    GzDecoder::new(MERGES).read_to_string(&mut text).map_err(|why| Error::internal(format!("{NAME}: {why}")))?;
    Ok(text)
}

pub(super) fn merges() -> Result<Merges> {
    let pair = |line: &str| line.split_once(' ').map(|(first, second)| (first.to_owned(), second.to_owned()));
    text()?.lines().map(|line| pair(line).ok_or_else(|| Error::internal(format!("{NAME}: `{line}`")))).collect()
}

/// Each token's id: the 256 bytes, the same at a word's end, the merges in order, begin and end.
pub(super) fn vocab() -> Result<Vocab> {
    let bytes = bytes();
    let ends = bytes.iter().map(|byte| format!("{byte}</w>"));
    let merged = merges()?.into_iter().map(|(first, second)| first + &second);
    let tokens = bytes.iter().map(char::to_string).chain(ends).chain(merged).chain([BEGIN, END].map(str::to_owned));
    Ok((0..).zip(tokens).map(|(id, token)| (token, id)).collect())
}

/// The characters that stand for the 256 bytes, in the order of their ids (`bytes_to_unicode` in
/// CLIP): printable bytes first, as themselves, then the others from U+0100 on.
fn bytes() -> Vec<char> {
    let printable = || (b'!'..=b'~').chain(0xa1..=0xac).chain(0xae..=0xff);
    let others = (0..=u8::MAX).filter(|byte| !printable().any(|printed| printed == *byte)).count();
    let moved = (0x100u32..).take(others).filter_map(char::from_u32);
    printable().map(char::from).chain(moved).collect()
}

/// `special_tokens_map.json`, as in the published SDXL folders.
pub(super) fn special_tokens(pad: &str) -> Value {
    let record = |content: &str, normalized: bool| json!({ "content": content, "lstrip": false, "normalized": normalized, "rstrip": false, "single_word": false });
    json!({ "bos_token": record(BEGIN, true), "eos_token": record(END, true), "pad_token": pad, "unk_token": record(END, true) })
}

/// Writes the tokenizer `name`, `tokenizer` or `tokenizer_2`, into the existing folder `folder`, in
/// files that transformers reads.
///
/// # Errors
/// [`Error::Write`].
pub fn write(name: &str, folder: &Path) -> Result<()> {
    let specials = special_tokens(padding(name));
    let vocab: BTreeMap<String, u32> = vocab()?.into_iter().collect();
    let mut config = json!({
        "add_prefix_space": false, "do_lower_case": true, "errors": "replace", "model_max_length": 77,
        "tokenizer_class": "CLIPTokenizer",
    });
    for (key, value) in specials.as_object().into_iter().flatten() {
        config[key] = value.clone();
    }
    let files = [
        ("vocab.json", json!(vocab).to_string()),
        ("merges.txt", format!("#version: 0.2\n{}", text()?)),
        ("special_tokens_map.json", specials.to_string()),
        ("tokenizer_config.json", config.to_string()),
    ];
    files.into_iter().try_for_each(|(name, content)| {
        let path = folder.join(name);
        std::fs::write(&path, content).map_err(Error::write(&path))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::ClipTokenizer;

    /// Ids by `transformers.CLIPTokenizer` with the files of openai/clip-vit-large-patch14.
    #[test]
    fn known_ids_of_a_known_text() {
        let tokenizer = ClipTokenizer::shipped(padding("tokenizer")).unwrap();
        assert_eq!(tokenizer.vocabulary(), 49_408);
        let ids = tokenizer.encode("a photo of a cat").unwrap().ids;
        assert_eq!(ids[..8], [49_406, 320, 1125, 539, 320, 2368, 49_407, 49_407]);
        let second = ClipTokenizer::shipped(padding("tokenizer_2")).unwrap().encode("a photo of a cat").unwrap().ids;
        assert_eq!((second[6], second[7], second[76]), (49_407, 0, 0));
    }

    #[test]
    fn what_is_written_is_the_same_tokenizer() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["tokenizer", "tokenizer_2"] {
            write(name, folder.path()).unwrap();
            let (read, own) = (ClipTokenizer::open(folder.path()).unwrap(), ClipTokenizer::shipped(padding(name)).unwrap());
            for text in ["Blurry, LOW quality!!", "naïve façade 2 <|endoftext|> 猫 🐈", "it's  the\tthird"] {
                assert_eq!(read.encode(text).unwrap(), own.encode(text).unwrap(), "{text}");
            }
        }
    }
}
