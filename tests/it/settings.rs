//! Configs that few models have: what diffusers' UNets and transformers' text encoders compute with
//! them (tests/golden/make_settings.py), and keys that are refused by name.

use std::path::Path;

use half::f16;
use sdxl_squeeze::checkpoint::{ConfigFile, TensorSource};
use sdxl_squeeze::model::text::{ClipText, TextConfig};
use sdxl_squeeze::model::unet::{Conditioning, Unet, UnetChain, UnetConfig};
use sdxl_squeeze::{Error, Result};
use serde_json::{Map, Value, json};
use tch::{Kind, Tensor};

use crate::single_file::values;
use crate::support::repo;

/// Bounds of outputs of size 0.5 and of size 1. Settings that differ change them by 1e-2 and more.
const UNET_BOUND: f64 = 1e-4;
const TEXT_BOUND: f64 = 2e-5;

/// Weights that are a function of name and place.
struct MadeUp;

impl TensorSource for MadeUp {
    fn tensor(&self, name: &str, shape: &[i64]) -> Result<Tensor> {
        Ok(made(name.strip_prefix("text_model.").unwrap_or(name), shape))
    }
}

/// `values` of `tests/golden/make_family.py` in fp32.
fn made(name: &str, shape: &[i64]) -> Tensor {
    let sizes: Vec<usize> = shape.iter().map(|size| *size as usize).collect();
    let bytes = values(name, &sizes);
    let halves: Vec<f16> = bytes.chunks_exact(2).map(|half| f16::from_le_bytes([half[0], half[1]])).collect();
    Tensor::from_slice(&halves).to_kind(Kind::Float).view(shape)
}

fn golden() -> Value {
    serde_json::from_str(&std::fs::read_to_string(repo("tests/golden/settings.json")).unwrap()).unwrap()
}

fn rows(golden: &Value, key: &str) -> Vec<Value> {
    golden[key].as_array().unwrap().clone()
}

/// A config with `keys` in the place of its own.
fn file(base: &Value, keys: &Value) -> ConfigFile {
    let mut entries: Map<String, Value> = base.as_object().unwrap().clone();
    entries.extend(keys.as_object().unwrap().clone());
    ConfigFile::from_entries(Path::new("config.json"), entries)
}

fn off(ours: &Tensor, theirs: &Value) -> f64 {
    let theirs: Vec<f64> = serde_json::from_value(theirs.clone()).unwrap();
    let theirs = Tensor::from_slice(&theirs);
    assert_eq!(ours.size(), theirs.size());
    (ours.to_kind(Kind::Double) - theirs).abs().max().double_value(&[])
}

#[test]
fn unets_of_unusual_configs_equal_diffusers() {
    let golden = golden();
    let rows = rows(&golden, "unets");
    assert!(rows.len() > 39);
    let mut faults = Vec::new();
    for row in rows {
        let config = UnetConfig::parse(file(&golden["unet"], &row["keys"])).unwrap();
        let pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim;
        let conditioning = Conditioning {
            encoder_hidden_states: made("states", &[2, 6, config.cross_attention_dim]),
            text_embeds: made("pooled", &[2, pooled]),
            time_ids: Tensor::from_slice(&[40f32, 56.0, 0.0, 8.0, 40.0, 56.0]).repeat([2, 1]),
            timestep_cond: config.time_cond_proj_dim.map(|width| made("guidance", &[2, width])),
        };
        // Sizes that do not halve evenly.
        let sample = made("sample", &[2, config.in_channels, 5, 7]);
        let unet = Unet::one_at_a_time(UnetChain::new(config), MadeUp).unwrap();
        let output = unet.predict(&sample, 481.0, &conditioning).unwrap().flatten(0, -1);
        let size = output.square().mean(Kind::Float).sqrt().view(1);
        let some = output.slice(0, 0, None, golden["stride"].as_i64().unwrap());
        let off = off(&Tensor::cat(&[some, size], 0), &row["output"]);
        if off > UNET_BOUND {
            faults.push(format!("{}: {off:.1e}", row["keys"]));
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[test]
fn keys_of_other_unets_are_refused_by_name() {
    let golden = golden();
    let rows = rows(&golden, "refused");
    assert!(rows.len() > 15);
    for row in rows {
        let (key, value) = (row["key"].as_str().unwrap(), &row["value"]);
        let refused = UnetConfig::parse(file(&golden["unet"], &json!({ key: value }))).unwrap_err();
        assert!(matches!(&refused, Error::ConfigKey { key: named, .. } if named == key), "{key} = {value}: {refused}");
    }
}

/// 2 stands for the highest id, as in configs of before transformers 4.29; any other id for its
/// first place in the text, or the first of all places where the text has none.
#[test]
fn every_end_of_text_pools_as_in_transformers() {
    let golden = golden();
    let base = json!({
        "architectures": ["CLIPTextModelWithProjection"], "vocab_size": 49408, "hidden_size": 8, "intermediate_size": 16,
        "num_hidden_layers": 2, "num_attention_heads": 2, "projection_dim": 6, "max_position_embeddings": 8,
    });
    let ids: Vec<Vec<i64>> = serde_json::from_value(golden["ids"].clone()).unwrap();
    let ids = Tensor::from_slice2(&ids);
    for row in rows(&golden, "texts") {
        let keys = match &row["eos_token_id"] {
            Value::Null => json!({}),
            id => json!({ "eos_token_id": id }),
        };
        let config = TextConfig::parse(file(&base, &keys)).unwrap();
        let pooled = ClipText::load(&config, &MadeUp).unwrap().forward(&ids).unwrap().pooled.unwrap();
        for (text, expected) in row["pooled"].as_array().unwrap().iter().enumerate() {
            let off = off(&pooled.get(text as i64), expected);
            assert!(off < TEXT_BOUND, "eos_token_id {}, text {text}: {off:.1e}", row["eos_token_id"]);
        }
    }
}
