//! Tokenizers, compared with transformers prompt by prompt.

use std::path::Path;

use sdxl_squeeze::model::text::{ClipTokenizer, vocabulary};
use serde_json::Value;

use crate::squeeze::Squeeze;
use crate::support::{copy, emoji, repo};

fn ids(value: &Value) -> Vec<i64> {
    value.as_array().unwrap().iter().map(|id| id.as_i64().unwrap()).collect()
}

/// Asserts that the tokenizer in `folder` gives the golden ids for every prompt of the file
/// `golden`.
fn equal(golden: &str, name: &str, folder: &Path) {
    tokenizes_as(golden, name, &ClipTokenizer::open(folder).unwrap());
}

/// Every prompt of a golden file, with `tokenizer`.
fn tokenizes_as(golden: &str, name: &str, tokenizer: &ClipTokenizer) {
    let golden: Value = serde_json::from_str(&std::fs::read_to_string(repo(golden)).unwrap()).unwrap();
    let prompts = golden["prompts"].as_array().unwrap();
    assert!(prompts.len() > 30);
    for (i, prompt) in prompts.iter().enumerate() {
        let prompt = prompt.as_str().unwrap();
        let tokens = tokenizer.encode(prompt).unwrap();
        assert_eq!(tokens.ids, ids(&golden[name]["ids"][i]), "{name}: {prompt:?}");
        // The ids in `raw` include the begin and end tokens and are not cut.
        let fits = ids(&golden[name]["raw"][i]).len() <= 77;
        assert_eq!(tokens.dropped.is_none(), fits, "{name}: {prompt:?}");
    }
}

#[test]
fn tokenizer_json_equals_transformers() {
    equal("tests/golden/tokens.json", "tokenizer", &emoji().join("tokenizer"));
    equal("tests/golden/tokens.json", "tokenizer_2", &emoji().join("tokenizer_2"));
}

#[test]
fn vocab_and_merges_equal_transformers() {
    for name in ["tokenizer", "tokenizer_2"] {
        let folder = tempfile::tempdir().unwrap();
        copy(&emoji().join(name), folder.path());
        std::fs::remove_file(folder.path().join("tokenizer.json")).unwrap();
        equal("tests/golden/tokens.json", name, folder.path());
        equal("tests/golden/tokens-base-like.json", name, &repo("tests/golden/base-like").join(name));
    }
}

/// The golden values are by CLIP's vocabulary, as the package open_clip_torch 3.3.0 has it.
#[test]
fn the_shipped_vocabulary_is_that_of_clip() {
    for name in ["tokenizer", "tokenizer_2"] {
        let tokenizer = ClipTokenizer::shipped(vocabulary::padding(name)).unwrap();
        assert_eq!(tokenizer.vocabulary(), 49_408);
        tokenizes_as("tests/golden/tokens-clip.json", name, &tokenizer);
    }
}

/// Tokenizers that were changed after they were made: saved after use, with tokens of textual
/// inversions. The golden file has the edits of each case.
#[test]
fn changed_tokenizers_equal_transformers() {
    let golden = std::fs::read_to_string(repo("tests/golden/added-tokens.json")).unwrap();
    let golden: Value = serde_json::from_str(&golden).unwrap();
    let prompts: Vec<&str> = golden["prompts"].as_array().unwrap().iter().map(|prompt| prompt.as_str().unwrap()).collect();
    let cases = golden["cases"].as_object().unwrap();
    assert!(cases.len() == 7 && prompts.len() > 10);
    for (case, edits) in cases {
        for name in ["tokenizer", "tokenizer_2"] {
            let folder = tempfile::tempdir().unwrap();
            copy(&emoji().join(name), folder.path());
            for file in edits["removed"].as_array().unwrap() {
                std::fs::remove_file(folder.path().join(file.as_str().unwrap())).unwrap();
            }
            for (file, keys) in edits["put"].as_object().unwrap() {
                let path = folder.path().join(file);
                let before = std::fs::read_to_string(&path).unwrap_or_else(|_| "{}".to_owned());
                let mut whole: serde_json::Map<String, Value> = serde_json::from_str(&before).unwrap();
                whole.extend(keys.as_object().unwrap().clone());
                std::fs::write(&path, Value::Object(whole).to_string()).unwrap();
            }
            let tokenizer = ClipTokenizer::open(folder.path()).unwrap();
            for (prompt, expected) in prompts.iter().zip(edits[name].as_array().unwrap()) {
                assert_eq!(tokenizer.encode(prompt).unwrap().ids, ids(expected), "{case}, {name}: {prompt:?}");
            }
        }
    }
}

/// diffusers fails when it looks up the embedding.
#[test]
fn a_token_without_an_embedding_is_refused_where_a_prompt_has_it() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model");
    copy(&emoji(), &model);
    std::fs::write(model.join("tokenizer_2/added_tokens.json"), r#"{"<cat>": 3514}"#).unwrap();
    let draw = |prompt: &str| {
        let run = Squeeze::new("generate").model(&model).args(["--prompt", prompt, "--steps", "1", "--overwrite"]);
        run.with("-o", folder.path().join("x.png"))
    };
    draw("a cat").succeeds();
    draw("a <cat>").is_refused(&["the token `<cat>` has the id 3514", "3514 embeddings", "leave the token out"]);
}

#[test]
fn what_is_cut_is_told() {
    let tokenizer = ClipTokenizer::open(&emoji().join("tokenizer")).unwrap();
    let long = format!("{}and a violin", "cat ".repeat(75));
    assert_eq!(tokenizer.encode(&long).unwrap().dropped.as_deref(), Some("and a violin"));
}
