//! LoRAs of a pipeline: their files, and the networks that they change.

use std::convert::Infallible;
use std::fmt::{self, Display};
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;

use sdxl_model::checkpoint::SourceFile;
use sdxl_model::checkpoint::lora::{Lora, LoraPart, LoraTarget, Loras};
use sdxl_model::ldm::Names;
use sdxl_model::text::ClipText;
use sdxl_model::unet::UnetChain;
use squeeze_base::error::Result;
use squeeze_base::pattern::NamePattern;

use super::folder::TextPart;
use super::parts::ModelFiles;

/// A LoRA file and the factor of its changes, written `FILE` or `FILE:SCALE`.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraFile {
    /// The file.
    pub path: PathBuf,
    /// The factor; 1 where none is written.
    pub scale: f64,
}

impl FromStr for LoraFile {
    type Err = Infallible;

    /// What stands after the last colon is the scale if it is a number; else it belongs to the
    /// path.
    fn from_str(written: &str) -> Result<Self, Infallible> {
        let scaled = written.rsplit_once(':').and_then(|(path, scale)| Some((path, scale.trim().parse().ok()?)));
        let (path, scale) = scaled.unwrap_or((written, 1.0));
        Ok(LoraFile { path: path.into(), scale })
    }
}

impl Display for LoraFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The scale is written where a path would be read with another one without it.
        let path = self.path.display().to_string();
        let is_plain = path.parse::<LoraFile>().is_ok_and(|read| read == *self);
        if is_plain { f.write_str(&path) } else { write!(f, "{path}:{}", self.scale) }
    }
}

/// Opens the LoRAs of `files` and binds them to a pipeline's networks; `None` if there are none.
///
/// # Errors
/// As [`Lora::open`] and [`Loras::bind`].
pub(crate) fn open(files: &ModelFiles, unet: &UnetChain, text_encoders: &[TextPart]) -> Result<Option<Arc<Loras>>> {
    if files.loras.is_empty() {
        return Ok(None);
    }
    let loras = files.loras.iter().map(|lora| Lora::open(&lora.path, lora.scale)).collect::<Result<Vec<_>>>()?;
    let ignored: Vec<NamePattern> = files.lora_ignore.as_deref().map(NamePattern::parse).transpose()?.into_iter().collect();
    let mut targets = vec![LoraTarget { part: LoraPart::Unet, tensors: unet.tensors()?, aliases: original_modules(unet) }];
    for part in text_encoders {
        let tensors = ClipText::tensors(&part.config)?;
        targets.push(LoraTarget { part: part_of(part), tensors, aliases: Vec::new() });
    }
    let loras = Loras::bind(loras, &targets, &ignored)?;
    for (part, name) in
        [(LoraPart::Unet, "UNet"), (LoraPart::TextEncoder, "text_encoder"), (LoraPart::TextEncoder2, "text_encoder_2")]
    {
        tracing::info!("LoRAs change {} tensors of the {name}", loras.changed(part));
    }
    Ok(Some(Arc::new(loras)))
}

/// The part whose LoRAs change a text encoder.
pub(crate) fn part_of(part: &TextPart) -> LoraPart {
    if part.encoder == "text_encoder_2" { LoraPart::TextEncoder2 } else { LoraPart::TextEncoder }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scale_is_what_follows_the_last_colon_and_is_a_number() {
        for (written, path, scale) in [
            ("a.safetensors", "a.safetensors", 1.0),
            ("a.safetensors:0.5", "a.safetensors", 0.5),
            ("C:/a.safetensors", "C:/a.safetensors", 1.0),
            ("C:/a.safetensors:-1", "C:/a.safetensors", -1.0),
            ("a:1:2", "a:1", 2.0),
            ("a:", "a:", 1.0),
        ] {
            let read: LoraFile = written.parse().unwrap();
            assert_eq!(read, LoraFile { path: path.into(), scale }, "{written}");
            assert_eq!(read.to_string().parse::<LoraFile>().unwrap(), read, "{written}");
        }
    }
}
