//! Opens a single-file checkpoint: what it is, which parts it has, what its shapes tell, and the
//! views by which its tensors are read.
//!
//! A checkpoint that the target builds without faults must be accepted, and one that lacks a part
//! must be accepted with a base.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use sdxl_squeeze::checkpoint::ConfigFile;
use sdxl_squeeze::inspect::inspect;
use sdxl_squeeze::model::ldm::{SingleFile, VaeFile};
use sdxl_squeeze::model::unet::{UnetChain, UnetConfig};
use sdxl_squeeze::pipeline::{ModelFiles, PipelineFolder};
use serde_json::{Map, Value, json};

use crate::choices::Choices;
use crate::{layout, scratch};

/// Names and shapes of a small checkpoint of the SDXL family.
fn tensors() -> &'static BTreeMap<String, Vec<u64>> {
    static TENSORS: OnceLock<BTreeMap<String, Vec<u64>>> = OnceLock::new();
    TENSORS.get_or_init(|| {
        let notes: Value =
            serde_json::from_str(include_str!("../../tests/golden/single-file/family.json")).expect("the golden file is JSON");
        serde_json::from_value(notes["tensors"].clone()).expect("it lists shapes by name")
    })
}

const MARKERS: [&str; 8] =
    ["v_pred", "ztsnr", "edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min", "model_ema.decay", "betas"];

const NAMES: [&str; 12] = [
    "model.diffusion_model.label_emb.0.0.weight",
    "model.diffusion_model.input_blocks.0.0.weight",
    "model.diffusion_model.input_blocks.1.0.out_layers.3.weight",
    "model.diffusion_model.out.2.weight",
    "model.diffusion_model.middle_block.1.proj_in.weight",
    "label_emb.0.0.weight",
    "add_embedding.linear_1.weight",
    "first_stage_model.decoder.conv_in.weight",
    "decoder.conv_in.weight",
    "conditioner.embedders.1.model.text_projection",
    "conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight",
    "edm_mean",
];

/// Runs one input: a file, a header and data, a few tensors, or a whole checkpoint with or without
/// changes.
pub fn run(data: &[u8]) {
    let mut choices = Choices(data);
    let kind = choices.below(5);
    if kind >= 3 {
        whole(&mut choices, kind == 4);
        return;
    }
    let file = match kind {
        0 => choices.rest().to_vec(),
        1 => {
            let header = usize::from(choices.short());
            let rest = choices.rest();
            let (header, data) = rest.split_at(header.min(rest.len()));
            layout::with_header(header, data)
        }
        _ => {
            let count = choices.below(8);
            let tensors: Vec<_> = (0..count).map(|_| layout::Tensor::any(&mut choices, &NAMES)).collect();
            layout::file(None, &tensors)
        }
    };
    read(&scratch::file("single.safetensors", &file));
}

/// Opens everything that a file may have. Returns whether it is a whole pipeline, and whether it is
/// one with a base.
fn read(path: &Path) -> [bool; 2] {
    let _ = VaeFile::open(path);
    let _ = inspect(path);
    if let Ok(file) = SingleFile::open(path) {
        let _ = file.family().to_string();
        let _ = (file.family().index(), file.family().scheduler(), file.family().marked_latents());
        for part in ["unet", "vae", "text_encoder", "text_encoder_2"] {
            let _ = (file.size_of(part), file.text_config(part));
        }
        if let Some(entries) = file.unet_config(None)
            && let Ok(config) = UnetConfig::parse(ConfigFile::from_entries(path, entries))
        {
            let chain = UnetChain::new(config);
            let tensors = chain.tensors();
            let _ = file.unet_weights(&chain).map(|weights| tensors.map(|tensors| weights.check(&tensors, |_| false)));
        }
    }
    let alone = ModelFiles { model: path.to_owned(), ..ModelFiles::of(path) };
    [open(&alone), open(&ModelFiles { base: Some(base()), ..alone })]
}

/// The whole checkpoint that completes files.
fn base() -> PathBuf {
    static BASE: OnceLock<PathBuf> = OnceLock::new();
    BASE.get_or_init(|| stored("base.safetensors", tensors().iter().map(|(name, shape)| (name.as_str(), shape)))).clone()
}

/// Writes a checkpoint of these names and shapes, whose weights are a hole in the file. A name that
/// comes twice is written once.
fn stored<'a>(name: &str, shapes: impl Iterator<Item = (&'a str, &'a Vec<u64>)>) -> PathBuf {
    let (mut header, mut end) = (Map::new(), 0u64);
    for (name, shape) in shapes {
        let bytes = shape.iter().try_fold(2u64, |product, n| product.checked_mul(*n)).unwrap_or(0);
        // No more than a full checkpoint of the family.
        if bytes > 1 << 33 || header.contains_key(name) {
            continue;
        }
        header.insert(name.to_owned(), json!({ "dtype": "F16", "shape": shape, "data_offsets": [end, end + bytes] }));
        end += bytes;
    }
    let content = layout::with_header(Value::Object(header).to_string().as_bytes(), &[]);
    let path = scratch::file(name, &content);
    let file = File::options().write(true).open(&path).expect("the file was written");
    file.set_len(content.len() as u64 + end).expect("a hole takes no room");
    path
}

/// Opens a pipeline and the headers of its weights.
fn open(files: &ModelFiles) -> bool {
    let Ok(folder) = PipelineFolder::open_files(files) else { return false };
    let parts = [folder.unet_weights(), folder.vae_weights()].into_iter();
    let text = folder.text_encoders.iter().map(|part| folder.text_weights(part));
    parts.chain(text).all(|part| part.is_ok())
}

/// A checkpoint that has all parts or all but one; `changed` says whether some of its tensors are
/// others.
fn whole(choices: &mut Choices, changed: bool) {
    const PARTS: [&str; 4] = ["", "first_stage_model.", "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."];
    let mut shapes = tensors().clone();
    let missing = choices.of(&PARTS);
    shapes.retain(|name, _| missing.is_empty() || !name.starts_with(missing));
    let mut markers: Vec<(&str, Vec<u64>)> = Vec::new();
    if changed {
        let names: Vec<String> = shapes.keys().cloned().collect();
        for _ in 0..=choices.below(4) {
            let name = &names[usize::from(choices.short()) % names.len()];
            let Some(mut shape) = shapes.remove(name) else { continue };
            match choices.below(4) {
                0 => continue,
                1 => shape.push(choices.number() % 70_000),
                2 => drop(shape.pop()),
                _ => {
                    let axis = choices.below(8) % shape.len().max(1);
                    if let Some(n) = shape.get_mut(axis) {
                        *n = choices.number() % 70_000;
                    }
                }
            }
            let name = if choices.rarely(3) { format!("{name}{}", choices.below(4)) } else { name.clone() };
            shapes.insert(name, shape);
        }
        for _ in 0..choices.below(4) {
            let shape = (0..choices.below(3)).map(|_| choices.below(6) as u64).collect();
            markers.push((choices.of(&MARKERS), shape));
        }
    }
    let listed =
        shapes.iter().map(|(name, shape)| (name.as_str(), shape)).chain(markers.iter().map(|(name, shape)| (*name, shape)));
    let path = stored("single.safetensors", listed);
    let [alone, completed] = read(&path);
    assert!(alone == missing.is_empty() || changed, "a checkpoint without `{missing}`: {alone}");
    assert!(completed || changed, "a checkpoint without `{missing}` is refused with a base");
}
