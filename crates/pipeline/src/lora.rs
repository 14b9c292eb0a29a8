//! LoRAs of a pipeline, bound to the networks that they change.

use std::sync::Arc;

use sdxl_model::checkpoint::SourceFile;
use sdxl_model::checkpoint::lora::{Lora, LoraPart, LoraTarget, Loras};
use sdxl_model::ldm::Names;
use sdxl_model::text::{ClipText, TextConfig};
use sdxl_model::unet::UnetChain;
use squeeze_base::error::Result;
use squeeze_base::pattern::NamePattern;

use super::parts::ModelFiles;

/// Opens the LoRAs of `files` and binds them to a pipeline's networks; `None` if there are none.
///
/// # Errors
/// As [`Lora::open`] and [`Loras::bind`].
pub(crate) fn open(
    files: &ModelFiles,
    unet: &UnetChain,
    text_encoders: &[(LoraPart, &TextConfig)],
) -> Result<Option<Arc<Loras>>> {
    if files.loras.is_empty() {
        return Ok(None);
    }
    let loras = files.loras.iter().map(|lora| Lora::open(&lora.path, lora.scale)).collect::<Result<Vec<_>>>()?;
    let ignored: Vec<NamePattern> = files.lora_ignore.as_deref().map(NamePattern::parse).transpose()?.into_iter().collect();
    let mut targets = vec![LoraTarget { part: LoraPart::Unet, tensors: unet.tensors()?, aliases: original_modules(unet) }];
    for (part, config) in text_encoders {
        targets.push(LoraTarget { part: *part, tensors: ClipText::tensors(config)?, aliases: Vec::new() });
    }
    let loras = Loras::bind(loras, &targets, &ignored)?;
    for (part, name) in
        [(LoraPart::Unet, "UNet"), (LoraPart::TextEncoder, "text_encoder"), (LoraPart::TextEncoder2, "text_encoder_2")]
    {
        tracing::info!("LoRAs change {} tensors of the {name}", loras.changed(part));
    }
    Ok(Some(Arc::new(loras)))
}

/// The names of modules in original checkpoints, each with the network's name. A UNet that has no
/// such names has none here.
fn original_modules(unet: &UnetChain) -> Vec<(String, String)> {
    let Ok(names) = Names::of_unet(unet) else { return Vec::new() };
    let weights = names.iter().filter_map(|(stored, views)| Some((stored.strip_suffix(".weight")?, views)));
    let pairs = weights.flat_map(|(stored, views)| {
        views.iter().filter_map(move |view| Some((stored.to_owned(), view.name.strip_suffix(".weight")?.to_owned())))
    });
    pairs.collect()
}

/// The LoRAs' files for the list of a container's sources.
pub(crate) fn sources(loras: &Loras) -> Result<Vec<SourceFile>> {
    let source = |lora: &Lora| {
        let name = lora.path().file_name().unwrap_or_default().to_string_lossy();
        let file = format!("lora/{name}");
        Ok(SourceFile { bytes: lora.bytes(), file, scale: Some(lora.strength()), sha256: lora.sha256()? })
    };
    loras.loras().iter().map(source).collect()
}
