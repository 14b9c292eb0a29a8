//! A folder in diffusers layout.

use std::fs::File;
use std::path::Path;

use sdxl_model::checkpoint::{TensorSource, TensorSpec};
use sdxl_model::text::ClipText;
use sdxl_pipeline::{ModelFiles, NetworkWeights, PipelineFolder, UnetWeights};
use serde_json::{Map, Value};
use squeeze_base::error::{Error, Result};
use squeeze_base::input;
use squeeze_base::output::NewFolder;
use squeeze_base::progress::{Progress, Task};
use squeeze_numerics::device::Placement;
use tch::{Device, Kind, Tensor};

/// Writes the new diffusers folder `out`: the pipeline `model`, with `weights` as its UNet,
/// decoded, in fp16, bit for bit. The other parts of a folder are copied; those of a single-file
/// checkpoint are written in fp16 under diffusers' names.
///
/// # Errors
/// If the weights are not of this pipeline's architecture, or a file cannot be read or written.
pub fn diffusers(weights: UnetWeights, model: &PipelineFolder, out: &Path, progress: &dyn Progress) -> Result<()> {
    let chain = weights.chain_of(model)?;
    let folder = NewFolder::create(out)?;
    match model.model_files() {
        ModelFiles { model, base: None, vae: None, text_encoder: None, text_encoder_2: None, loras, .. }
            if model.is_dir() && loras.is_empty() =>
        {
            copy_all_but_unet_weights(model, folder.path(), 8)?;
        }
        ModelFiles { .. } => write_all_but_unet_weights(model, folder.path())?,
    }
    let tensors = chain.tensors()?;
    let task = Task::begin(progress, "decoding", "tensors", tensors.len());
    let source = weights.source(Placement { device: Device::Cpu, kind: Kind::Half });
    let mut decoded = Vec::new();
    for spec in &tensors {
        task.advance(&spec.name);
        decoded.push((spec.name.clone(), source.tensor(&spec.name, &spec.shape)?));
    }
    let path = folder.path().join("unet/diffusion_pytorch_model.safetensors");
    Tensor::write_safetensors(&decoded, &path)?;
    folder.commit()
}

/// Writes the parts of a pipeline whose files are not in diffusers layout.
fn write_all_but_unet_weights(model: &PipelineFolder, to: &Path) -> Result<()> {
    write_json(&to.join("model_index.json"), model.index())?;
    write_json(&to.join("scheduler/scheduler_config.json"), &scheduler_of(model))?;
    write_json(&to.join("unet/config.json"), model.unet_config())?;
    write_json(&to.join("vae/config.json"), model.vae_config())?;
    let weights = model.vae_network()?;
    write_weights(&weights, weights.tensors().into_iter(), &to.join("vae/diffusion_pytorch_model.safetensors"))?;
    for part in &model.text_encoders {
        write_json(&to.join(part.encoder).join("config.json"), part.config_entries())?;
        let weights = model.text_network(part)?;
        let tensors = ClipText::tensors(&part.config)?;
        let optional = weights.tensors().into_iter().filter(|spec| spec.name.starts_with("text_model.final_layer_norm."));
        let optional: Vec<TensorSpec> = optional.filter(|spec| !tensors.contains(spec)).collect();
        write_weights(&weights, tensors.into_iter().chain(optional), &to.join(part.encoder).join("model.safetensors"))?;
        let folder = to.join(part.tokenizer);
        std::fs::create_dir_all(&folder).map_err(Error::write(&folder))?;
        model.write_tokenizer(part, &folder)?;
    }
    Ok(())
}

/// The sampler's config with the class that the index names.
fn scheduler_of(model: &PipelineFolder) -> Map<String, Value> {
    let mut entries = model.scheduler.entries().clone();
    entries.insert("_class_name".to_owned(), model.scheduler.class().into());
    entries
}

fn write_weights(weights: &NetworkWeights, tensors: impl Iterator<Item = TensorSpec>, path: &Path) -> Result<()> {
    let source = weights.source(Placement { device: Device::Cpu, kind: Kind::Half });
    let named = tensors.map(|spec| Ok((source.tensor(&spec.name, &spec.shape)?, spec.name)).map(|(tensor, name)| (name, tensor)));
    Tensor::write_safetensors(&named.collect::<Result<Vec<_>>>()?, path)?;
    Ok(())
}

/// Writes a config, and creates its folder.
fn write_json(path: &Path, entries: &Map<String, Value>) -> Result<()> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).map_err(Error::write(folder))?;
    }
    let text = format!("{:#}\n", Value::Object(entries.clone()));
    std::fs::write(path, text).map_err(Error::write(path))
}

/// Copies everything of a pipeline except the UNet's weights. Links are followed, as the hub's
/// cache consists of them. A pipeline is two levels deep: an endless one is a link to a folder that
/// contains it.
fn copy_all_but_unet_weights(from: &Path, to: &Path, levels: usize) -> Result<()> {
    if levels == 0 {
        return Err(Error::bad_file(from, "is too deep below the pipeline's folder; does a link lead back up?"));
    }
    for entry in std::fs::read_dir(from).map_err(Error::read(from))? {
        let entry = entry.map_err(Error::read(from))?;
        let (path, name) = (entry.path(), entry.file_name());
        let target = to.join(&name);
        let lossy = name.to_string_lossy();
        if path.is_dir() {
            std::fs::create_dir(&target).map_err(Error::write(&target))?;
            copy_all_but_unet_weights(&path, &target, levels - 1)?;
        } else if !(from.file_name() == Some("unet".as_ref()) && lossy.starts_with("diffusion_pytorch_model")) {
            // `input::open` refuses pipes and devices.
            let mut source = input::open(&path)?;
            let mut copied = File::create_new(&target).map_err(Error::write(&target))?;
            std::io::copy(&mut source, &mut copied).map_err(Error::write(&target))?;
        }
    }
    Ok(())
}
