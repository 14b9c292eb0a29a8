//! A single-file checkpoint, as A1111, ComfyUI and Forge read it.

use std::collections::BTreeMap;
use std::path::Path;

use half::f16;
use safetensors::Dtype;
use sdxl_model::checkpoint::{TensorBytes, View};
use sdxl_model::ldm::{MARKERS, Names};
use sdxl_model::unet::UnetChain;
use sdxl_pipeline::{NetworkWeights, PipelineFolder, UnetWeights};
use serde_json::{Value, json};
use squeeze_base::error::{Error, Result};
use squeeze_base::output::write_file;
use squeeze_base::progress::{Progress, Task};
use squeeze_base::safetensors_file::Header;
use squeeze_numerics::device::Placement;
use tch::{Device, Kind, Tensor};

/// A tensor of the new file.
struct Item<'a> {
    name: String,
    shape: Vec<i64>,
    dtype: Dtype,
    content: Content<'a>,
}

/// The source of a tensor's values.
enum Content<'a> {
    /// A tensor of the UNet, decoded.
    Unet(String, Vec<i64>),
    /// The views of a part's network on the stored tensor.
    Part(&'a NetworkWeights, Vec<View>),
    /// Bytes that are known.
    Bytes(Vec<u8>),
}

/// Writes the checkpoint `out`: the UNet of `weights`, decoded, in fp16, bit for bit, and text
/// encoders and VAE of `pipeline` in the dtypes in which they are stored. Without a pipeline the
/// file has the UNet alone.
///
/// # Errors
/// If the weights are not of this pipeline's architecture, a tensor has no name in such files, or a
/// file cannot be read or written.
pub fn single_file(weights: UnetWeights, pipeline: Option<&PipelineFolder>, out: &Path, progress: &dyn Progress) -> Result<()> {
    let chain = match pipeline {
        Some(pipeline) => weights.chain_of(pipeline)?,
        None => weights.chain()?,
    };
    let mut items = of_unet(&chain)?;
    let mut parts: Vec<(String, Names, NetworkWeights)> = Vec::new();
    if let Some(pipeline) = pipeline {
        let count = pipeline.text_encoders.len();
        for (number, part) in pipeline.text_encoders.iter().enumerate() {
            // OpenCLIP is the last encoder, and a refiner's only one.
            let is_open_clip = number + 1 == count;
            let kind = if is_open_clip { "model" } else { "transformer" };
            let names = if is_open_clip { Names::of_open_clip(&part.config) } else { Names::of_clip(&part.config)? };
            parts.push((format!("conditioner.embedders.{number}.{kind}."), names, pipeline.text_network(part)?));
        }
        parts.push(("first_stage_model.".to_owned(), Names::of_vae(&pipeline.vae)?, pipeline.vae_network()?));
        items.extend(markers(pipeline)?);
    }
    for (prefix, names, weights) in &parts {
        items.extend(of_part(prefix, names, weights));
    }
    items.sort_by(|a, b| a.name.cmp(&b.name));
    write(&items, weights, out, progress)
}

fn of_unet(chain: &UnetChain) -> Result<Vec<Item<'static>>> {
    let shapes: BTreeMap<String, Vec<i64>> = chain.tensors()?.into_iter().map(|spec| (spec.name, spec.shape)).collect();
    let names = Names::of_unet(chain)?;
    let item = |(stored, views): (&str, &[View])| {
        let name = views[0].name.clone();
        let shape = shapes[&name].clone();
        let content = Content::Unet(name, shape.clone());
        Item { name: format!("model.diffusion_model.{stored}"), shape, dtype: Dtype::F16, content }
    };
    Ok(names.iter().map(item).collect())
}

/// The tensors of a part that are there: a folder may lack the VAE's encoder.
fn of_part<'a>(prefix: &str, names: &Names, weights: &'a NetworkWeights) -> Vec<Item<'a>> {
    let mut items = Vec::new();
    for (stored, views) in names.iter() {
        let first = &views[0].name;
        let (Some(shape), Some(dtype)) = (weights.shape(first), weights.dtype_of(first)) else { continue };
        let shape = names.stored_shape(views, shape);
        items.push(Item { name: format!("{prefix}{stored}"), shape, dtype, content: Content::Part(weights, views.to_vec()) });
    }
    items
}

/// The tensors that tell what the model predicts: those of its checkpoint, or those that its
/// sampler's config asks for.
fn markers(pipeline: &PipelineFolder) -> Result<Vec<Item<'static>>> {
    let mut items = Vec::new();
    if let Some(checkpoint) = pipeline.single_file() {
        let file = checkpoint.file();
        for name in MARKERS {
            if let Some(entry) = file.entries().get(name) {
                let content = Content::Bytes(file.read(name)?);
                items.push(Item { name: name.to_owned(), shape: entry.shape.clone(), dtype: entry.dtype, content });
            }
        }
        return Ok(items);
    }
    let entries = pipeline.scheduler.entries();
    let number = |key: &str| entries.get(key).and_then(Value::as_f64);
    let mut mark = |name: &str, shape: Vec<i64>, values: &[f64]| {
        let bytes = values.iter().flat_map(|value| (*value as f32).to_le_bytes()).collect();
        items.push(Item { name: name.to_owned(), shape, dtype: Dtype::F32, content: Content::Bytes(bytes) });
    };
    let class = entries.get("_class_name").and_then(Value::as_str).unwrap_or_default();
    let prediction = entries.get("prediction_type").and_then(Value::as_str).unwrap_or("epsilon");
    match (class.starts_with("EDM"), prediction, &pipeline.vae.latents_mean_std) {
        (true, "epsilon", Some((mean, std))) => {
            mark("edm_mean", vec![mean.len() as i64], mean);
            mark("edm_std", vec![std.len() as i64], std);
        }
        (true, "v_prediction", _) => {
            for (name, key) in [("edm_vpred.sigma_max", "sigma_max"), ("edm_vpred.sigma_min", "sigma_min")] {
                mark(name, Vec::new(), number(key).as_slice());
            }
        }
        (false, "epsilon", _) => {}
        (false, "v_prediction", _) => {
            mark("v_pred", vec![0], &[]);
            if entries.get("rescale_betas_zero_snr") == Some(&json!(true)) {
                mark("ztsnr", vec![0], &[]);
            }
        }
        (_, other, _) => tracing::warn!(
            "single-file checkpoints have no mark for prediction_type `{other}` of {class}; whoever loads the file must set the sampler"
        ),
    }
    Ok(items)
}

fn write(items: &[Item<'_>], unet: UnetWeights, out: &Path, progress: &dyn Progress) -> Result<()> {
    let mut header = Header::new(&BTreeMap::from([("format".to_owned(), "pt".to_owned())]));
    for Item { name, shape, dtype, .. } in items {
        header.push(name, *dtype, shape, shape.iter().product::<i64>() as u64 * (dtype.bitsize() / 8) as u64);
    }
    let header = header.to_bytes()?;
    let task = Task::begin(progress, "writing", "tensors", items.len());
    let mut failed = None;
    let written = write_file(out, |file| {
        file.write_all(&header)?;
        for item in items {
            task.advance(&item.name);
            match bytes(item, unet) {
                Ok(bytes) => file.write_all(&bytes)?,
                Err(why) => {
                    failed = Some(why);
                    return Err(std::io::Error::other("a tensor could not be read"));
                }
            }
        }
        Ok(())
    });
    failed.map_or(written, Err)
}

fn bytes(item: &Item<'_>, unet: UnetWeights) -> Result<Vec<u8>> {
    match &item.content {
        Content::Bytes(bytes) => Ok(bytes.clone()),
        Content::Unet(name, shape) => Ok(unet.decode(name, shape)?.into_iter().flat_map(f16::to_le_bytes).collect()),
        Content::Part(weights, views) => {
            let source = weights.source(Placement { device: Device::Cpu, kind: kind(item.dtype)? });
            let tensors: Vec<Tensor> = views
                .iter()
                .map(|view| source.tensor(&view.name, weights.shape(&view.name).unwrap_or_default()))
                .collect::<Result<_>>()?;
            let whole = Tensor::f_cat(&tensors, 0)?;
            let whole = if views[0].transposed { whole.f_transpose(0, 1)? } else { whole };
            Ok(TensorBytes::of(&whole)?.bytes().to_vec())
        }
    }
}

/// libtorch's kind of a dtype in which weights are stored.
fn kind(dtype: Dtype) -> Result<Kind> {
    match dtype {
        Dtype::F64 => Ok(Kind::Double),
        Dtype::F32 => Ok(Kind::Float),
        Dtype::F16 => Ok(Kind::Half),
        Dtype::BF16 => Ok(Kind::BFloat16),
        other => Err(Error::Argument(format!("tensors of {other:?} are not written"))),
    }
}
