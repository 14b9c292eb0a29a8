//! Turns a container into what other programs load.

mod coremltools;

use std::path::Path;

use tch::{Device, Kind};

pub use coremltools::{Moved, SmallWeights, coremltools};

use crate::checkpoint::TensorSource;
use crate::container::Container;
use crate::device::Placement;
use crate::error::{Error, Result};
use crate::output::NewFolder;
use crate::pipeline::PipelineFolder;
use crate::progress::{Progress, Task};

/// Writes the new diffusers folder `out`: the pipeline in `model`, with the UNet that `container` decodes to, in fp16, bit for bit.
///
/// # Errors
/// If the container is not of this pipeline's architecture, or a file cannot be read or written.
pub fn diffusers(container: &Container, model: &Path, out: &Path, progress: &dyn Progress) -> Result<()> {
    let pipeline = PipelineFolder::open(model)?;
    let chain = container.unet()?;
    if chain.config() != pipeline.unet.config() {
        let path = container.path().display();
        return Err(Error::Argument(format!("{path} holds another architecture than {}", model.display())));
    }
    let folder = NewFolder::create(out)?;
    copy_all_but_unet_weights(model, folder.path())?;
    let tensors = chain.tensors()?;
    let task = Task::begin(progress, "decoding", "tensors", tensors.len());
    let source = container.source(Placement { device: Device::Cpu, kind: Kind::Half });
    let mut decoded = Vec::new();
    for spec in &tensors {
        task.advance(&spec.name);
        decoded.push((spec.name.clone(), source.tensor(&spec.name, &spec.shape)?));
    }
    let path = folder.path().join("unet/diffusion_pytorch_model.safetensors");
    tch::Tensor::write_safetensors(&decoded, &path)?;
    folder.commit()
}

/// Everything of a pipeline but the UNet's weights; links are followed, as the hub's cache consists of them.
fn copy_all_but_unet_weights(from: &Path, to: &Path) -> Result<()> {
    for entry in std::fs::read_dir(from).map_err(Error::read(from))? {
        let path = entry.map_err(Error::read(from))?.path();
        let Some(name) = path.file_name() else { continue };
        let target = to.join(name);
        let lossy = name.to_string_lossy();
        if path.is_dir() {
            std::fs::create_dir(&target).map_err(Error::write(&target))?;
            copy_all_but_unet_weights(&path, &target)?;
        } else if !(from.file_name() == Some("unet".as_ref()) && lossy.starts_with("diffusion_pytorch_model")) {
            std::fs::copy(&path, &target).map_err(Error::write(&target))?;
        }
    }
    Ok(())
}
