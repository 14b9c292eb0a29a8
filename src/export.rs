//! Exports a UNet's weights to the formats of other programs.

mod coremltools;

use std::fs::File;
use std::path::Path;

pub use coremltools::{Moved, SmallWeights, coremltools};
use sdxl_model::checkpoint::TensorSource;
use sdxl_pipeline::{PipelineFolder, UnetWeights};
use squeeze_base::error::{Error, Result};
use squeeze_base::input;
use squeeze_base::output::NewFolder;
use squeeze_base::progress::{Progress, Task};
use squeeze_numerics::device::Placement;
use tch::{Device, Kind};

/// Writes the new diffusers folder `out`: the pipeline in `model`, with `weights` as its UNet,
/// decoded, in fp16, bit for bit.
///
/// # Errors
/// If the weights are not of this pipeline's architecture, or a file cannot be read or written.
pub fn diffusers(weights: UnetWeights, model: &Path, out: &Path, progress: &dyn Progress) -> Result<()> {
    let chain = weights.chain_of(&PipelineFolder::open(model)?)?;
    let folder = NewFolder::create(out)?;
    copy_all_but_unet_weights(model, folder.path(), 8)?;
    let tensors = chain.tensors()?;
    let task = Task::begin(progress, "decoding", "tensors", tensors.len());
    let source = weights.source(Placement { device: Device::Cpu, kind: Kind::Half });
    let mut decoded = Vec::new();
    for spec in &tensors {
        task.advance(&spec.name);
        decoded.push((spec.name.clone(), source.tensor(&spec.name, &spec.shape)?));
    }
    let path = folder.path().join("unet/diffusion_pytorch_model.safetensors");
    tch::Tensor::write_safetensors(&decoded, &path)?;
    folder.commit()
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
