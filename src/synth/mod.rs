//! Writes whole pipelines with synthetic weights, for tests and benchmarks at full size without a
//! real model.

mod preset;
mod single_file;
mod statistics;

use std::borrow::Cow;
use std::collections::HashMap;
use std::path::Path;

pub use preset::Preset;
use safetensors::tensor::View;
use safetensors::{Dtype, serialize_to_file};
use sdxl_model::checkpoint::{ConfigFile, TensorSpec};
use sdxl_model::text::{ClipText, TextConfig};
use sdxl_model::unet::{UnetChain, UnetConfig};
use sdxl_model::vae::{VaeConfig, VaeDecoder, VaeEncoder};
use serde_json::{Map, Value};
pub use single_file::synthesize_single_file;
use squeeze_base::error::{Error, Result};
use squeeze_base::output::NewFolder;
use squeeze_base::progress::{Progress, Task};
use statistics::{Statistics, size_of_dtype};
use tch::Kind;

/// Writes the pipeline `preset` to the new folder `out`, in diffusers layout, with weights of
/// `kind` drawn from `seed`. Tensors are drawn one at a time: peak memory is that of the largest.
///
/// The tokenizers have CLIP's first 3,000 merges, from the bundled model: enough to exercise the
/// encoders.
///
/// # Errors
/// If `out` exists, cannot be written, or `kind` is not a dtype of weights.
pub fn synthesize(preset: Preset, out: &Path, seed: u64, kind: Kind, progress: &dyn Progress) -> Result<()> {
    let dtype = dtype_of(kind)?;
    let configs = preset.configs();
    let folder = NewFolder::create(out)?;
    let root = folder.path();
    let mut parts: Vec<Part> = Vec::new();

    let unet = UnetConfig::parse(in_memory(&configs.unet)?)?;
    parts.push(Part { folder: "unet", stem: "diffusion_pytorch_model", tensors: UnetChain::new(unet).tensors()? });
    let vae = VaeConfig::parse(in_memory(&configs.vae)?)?;
    let tensors = [VaeEncoder::tensors(&vae)?, VaeDecoder::tensors(&vae)?].concat();
    parts.push(Part { folder: "vae", stem: "diffusion_pytorch_model", tensors });
    for (encoder, tokenizer, config) in &configs.text {
        let config = TextConfig::parse(in_memory(config)?)?;
        parts.push(Part { folder: encoder, stem: "model", tensors: ClipText::tensors(&config)? });
        write_tokenizer(&root.join(tokenizer), *tokenizer == "tokenizer_2")?;
    }

    write_json(&root.join("model_index.json"), &configs.model_index)?;
    write_json(&root.join("scheduler/scheduler_config.json"), &configs.scheduler)?;
    write_json(&root.join("unet/config.json"), &configs.unet)?;
    write_json(&root.join("vae/config.json"), &configs.vae)?;
    for (encoder, _, config) in &configs.text {
        write_json(&root.join(encoder).join("config.json"), config)?;
    }

    let task = Task::begin(progress, "writing weights", "tensors", parts.iter().map(|part| part.tensors.len()).sum());
    for part in &parts {
        part.write(root, Statistics { seed }, dtype, &task)?;
    }
    folder.commit()
}

/// The dtype under which weights of `kind` are stored.
fn dtype_of(kind: Kind) -> Result<Dtype> {
    match kind {
        Kind::Float => Ok(Dtype::F32),
        Kind::Half => Ok(Dtype::F16),
        Kind::BFloat16 => Ok(Dtype::BF16),
        other => Err(Error::Argument(format!("weights cannot be {other:?}"))),
    }
}

/// A folder's weights.
struct Part<'a> {
    folder: &'a str,
    stem: &'a str,
    tensors: Vec<TensorSpec>,
}

impl Part<'_> {
    fn write(&self, root: &Path, statistics: Statistics, dtype: Dtype, task: &Task) -> Result<()> {
        let tensors = self.tensors.iter().map(|spec| {
            let name = format!("{}/{}", self.folder, spec.name);
            let shape = spec.shape.iter().map(|n| *n as usize).collect();
            (spec.name.as_str(), Lazy { name, shape, dtype, statistics, task })
        });
        let path = root.join(self.folder).join(format!("{}.safetensors", self.stem));
        let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
        serialize_to_file(tensors, Some(metadata), &path)
            .map_err(|why| Error::Write { path: path.clone(), source: std::io::Error::other(why) })
    }
}

/// A tensor whose values are drawn when it is written.
struct Lazy<'a> {
    name: String,
    shape: Vec<usize>,
    dtype: Dtype,
    statistics: Statistics,
    task: &'a Task<'a>,
}

impl View for Lazy<'_> {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        self.task.advance(&self.name);
        Cow::Owned(self.statistics.bytes(&self.name, &self.shape, self.dtype))
    }

    fn data_len(&self) -> usize {
        self.shape.iter().product::<usize>() * size_of_dtype(self.dtype)
    }
}

/// The parsed form of a config that will be written.
fn in_memory(config: &Value) -> Result<ConfigFile> {
    let entries: Map<String, Value> = config.as_object().cloned().expect("a preset's configs are JSON objects");
    Ok(ConfigFile::from_entries(Path::new("config.json"), entries))
}

fn create_parent(path: &Path) -> Result<()> {
    match path.parent() {
        Some(parent) => std::fs::create_dir_all(parent).map_err(Error::write(parent)),
        None => Ok(()),
    }
}

fn write_json(path: &Path, value: &Value) -> Result<()> {
    create_parent(path)?;
    std::fs::write(path, format!("{value:#}\n")).map_err(Error::write(path))
}

/// The bundled model's vocabulary, CLIP's first 3,000 merges (MIT licence, see
/// `models/emoji-sdxl/README.md`).
fn write_tokenizer(folder: &Path, second: bool) -> Result<()> {
    let pad = if second { "!" } else { "<|endoftext|>" };
    let special = serde_json::json!({
        "bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "pad_token": pad,
    });
    let mut config = special.clone();
    config["model_max_length"] = 77.into();
    config["tokenizer_class"] = "CLIPTokenizer".into();
    write_json(&folder.join("special_tokens_map.json"), &special)?;
    write_json(&folder.join("tokenizer_config.json"), &config)?;
    for (name, content) in [
        ("vocab.json", include_str!("../../models/emoji-sdxl/tokenizer/vocab.json")),
        ("merges.txt", include_str!("../../models/emoji-sdxl/tokenizer/merges.txt")),
    ] {
        let path = folder.join(name);
        std::fs::write(&path, content).map_err(Error::write(&path))?;
    }
    Ok(())
}
