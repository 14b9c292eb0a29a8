//! Reads a file of prompts, and encodes every prompt with two tokenizers.

use std::path::Path;
use std::sync::OnceLock;

use sdxl_squeeze::config::read_prompts;
use sdxl_squeeze::model::text::ClipTokenizer;

use crate::scratch;

/// The tokenizer of the bundled model, and a small one that encodes every `!` as padding. Each has
/// the size of its vocabulary beside it, because counting takes long.
fn tokenizers() -> &'static [(ClipTokenizer, i64)] {
    static TOKENIZERS: OnceLock<Vec<(ClipTokenizer, i64)>> = OnceLock::new();
    TOKENIZERS.get_or_init(|| {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        ["models/emoji-sdxl/tokenizer", "tests/golden/base-like/tokenizer_2"]
            .map(|folder| ClipTokenizer::open(&root.join(folder)).expect("the tokenizer is there"))
            .map(|tokenizer| {
                let vocabulary = tokenizer.vocabulary();
                (tokenizer, vocabulary)
            })
            .into()
    })
}

/// Runs one input, which is a file of prompts.
pub fn run(data: &[u8]) {
    let Ok(prompts) = read_prompts(&scratch::file("prompts.txt", data)) else { return };
    assert!(!prompts.is_empty());
    for prompt in &prompts {
        assert!(!prompt.trim().is_empty() && !prompt.contains(['\n', '\r']) && !prompt.starts_with('#'));
        for (tokenizer, vocabulary) in tokenizers() {
            if let Ok(tokens) = tokenizer.encode(prompt) {
                assert_eq!(tokens.ids.len(), tokenizer.length());
                assert!(tokens.ids.iter().all(|id| (0..*vocabulary).contains(id)));
            }
        }
    }
}
