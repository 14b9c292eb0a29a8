//! A synthetic pipeline as one checkpoint in LDM's names.

use std::collections::BTreeMap;
use std::path::Path;

use safetensors::Dtype;
use sdxl_model::checkpoint::{TensorSpec, View};
use sdxl_model::ldm::Names;
use sdxl_model::text::{ClipText, TextConfig};
use sdxl_model::unet::{UnetChain, UnetConfig};
use sdxl_model::vae::{VaeConfig, VaeDecoder, VaeEncoder};
use squeeze_base::error::Result;
use squeeze_base::output::write_file;
use squeeze_base::progress::{Progress, Task};
use squeeze_base::safetensors_file::Header;
use tch::Kind;

use super::preset::Preset;
use super::statistics::{Statistics, size_of_dtype};
use super::{dtype_of, in_memory};

/// A tensor of the file.
struct Item {
    name: String,
    shape: Vec<i64>,
    /// The tensors of the folder that it holds, with their shapes there.
    parts: Vec<(String, Vec<usize>)>,
    transposed: bool,
}

/// Writes the pipeline `preset` to the file `out`, as single-file checkpoints are published. Its
/// weights are those that [`synthesize`](super::synthesize) draws from the same seed. Tensors are
/// drawn one at a time: peak memory is that of the largest.
///
/// The file has no tokenizers. Readers take CLIP's, whose ids the full-size presets have.
///
/// # Errors
/// If `out` cannot be written, or `kind` is not a dtype of weights.
pub fn synthesize_single_file(preset: Preset, out: &Path, seed: u64, kind: Kind, progress: &dyn Progress) -> Result<()> {
    let dtype = dtype_of(kind)?;
    let items = items(preset)?;
    let mut header = Header::new(&BTreeMap::from([("format".to_owned(), "pt".to_owned())]));
    for item in &items {
        let bytes = item.shape.iter().product::<i64>() as u64 * size_of_dtype(dtype) as u64;
        header.push(&item.name, dtype, &item.shape, bytes);
    }
    let header = header.to_bytes()?;
    let task = Task::begin(progress, "writing weights", "tensors", items.len());
    write_file(out, |file| {
        file.write_all(&header)?;
        for item in &items {
            task.advance(&item.name);
            item.write(Statistics { seed }, dtype, file)?;
        }
        Ok(())
    })
}

/// The tensors of the file, by name.
fn items(preset: Preset) -> Result<Vec<Item>> {
    let configs = preset.configs();
    let unet = UnetChain::new(UnetConfig::parse(in_memory(&configs.unet)?)?);
    let vae = VaeConfig::parse(in_memory(&configs.vae)?)?;
    let vae_tensors = [VaeEncoder::tensors(&vae)?, VaeDecoder::tensors(&vae)?].concat();
    let mut items = of_part("model.diffusion_model.", "unet", &Names::of_unet(&unet)?, unet.tensors()?);
    items.extend(of_part("first_stage_model.", "vae", &Names::of_vae(&vae)?, vae_tensors));
    for (number, (folder, _, config)) in configs.text.iter().enumerate() {
        let config = TextConfig::parse(in_memory(config)?)?;
        let (kind, names) = match *folder {
            "text_encoder" => ("transformer", Names::of_clip(&config)?),
            _ => ("model", Names::of_open_clip(&config)),
        };
        let prefix = format!("conditioner.embedders.{number}.{kind}.");
        items.extend(of_part(&prefix, folder, &names, ClipText::tensors(&config)?));
    }
    items.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(items)
}

fn of_part(prefix: &str, folder: &str, names: &Names, tensors: Vec<TensorSpec>) -> Vec<Item> {
    let shapes: BTreeMap<String, Vec<i64>> = tensors.into_iter().map(|spec| (spec.name, spec.shape)).collect();
    let item = |(stored, views): (&str, &[View])| {
        let of = |view: &View| (format!("{folder}/{}", view.name), shapes[&view.name].iter().map(|n| *n as usize).collect());
        Item {
            name: format!("{prefix}{stored}"),
            shape: names.stored_shape(views, &shapes[&views[0].name]),
            parts: views.iter().map(of).collect(),
            transposed: views[0].transposed,
        }
    };
    names.iter().map(item).collect()
}

impl Item {
    fn write(&self, statistics: Statistics, dtype: Dtype, file: &mut dyn std::io::Write) -> std::io::Result<()> {
        for (name, shape) in &self.parts {
            let bytes = statistics.bytes(name, shape, dtype);
            match (self.transposed, &shape[..]) {
                (true, [rows, columns]) => file.write_all(&transposed(&bytes, *rows, *columns, size_of_dtype(dtype)))?,
                (_, _) => file.write_all(&bytes)?,
            }
        }
        Ok(())
    }
}

/// A matrix of `rows` x `columns` elements of `width` bytes, column by column.
fn transposed(bytes: &[u8], rows: usize, columns: usize, width: usize) -> Vec<u8> {
    let elements = (0..columns).flat_map(|column| (0..rows).map(move |row| row * columns + column));
    elements.flat_map(|place| &bytes[place * width..][..width]).copied().collect()
}
