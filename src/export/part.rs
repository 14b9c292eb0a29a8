//! Core ML packages of a pipeline's text encoders and VAE.

use std::fmt::{self, Display};
use std::path::Path;

use sdxl_pipeline::PipelineFolder;
use squeeze_base::error::{Error, Result};
use squeeze_base::progress::Progress;
use squeeze_coreml::{Label, Part, PartWeights, WrittenPackage, write_part};

/// A network of a pipeline beside the UNet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PipelinePart {
    /// The first text encoder.
    TextEncoder,
    /// The second text encoder, whose pooled text the UNet is told.
    TextEncoder2,
    /// The decoder of the VAE.
    VaeDecoder,
    /// The encoder of the VAE.
    VaeEncoder,
}

impl Display for PipelinePart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            PipelinePart::TextEncoder => "text_encoder",
            PipelinePart::TextEncoder2 => "text_encoder_2",
            PipelinePart::VaeDecoder => "vae_decoder",
            PipelinePart::VaeEncoder => "vae_encoder",
        })
    }
}

/// Writes a part of `model` as the new Core ML package `out`: [`squeeze_coreml::write_part`] with
/// the part's weights and config. `latents` are height and width of the VAE's latents.
///
/// # Errors
/// [`Error::Argument`] if the pipeline lacks the part; as [`squeeze_coreml::write_part`].
pub fn coreml_part(
    model: &PipelineFolder,
    part: PipelinePart,
    latents: [i64; 2],
    label: &Label,
    out: &Path,
    progress: &dyn Progress,
) -> Result<WrittenPackage> {
    let vae = |kind| {
        let weights = model.vae_network()?;
        write_part(kind, PartWeights { weights: weights.stored(), config: model.vae_config() }, label, out, progress)
    };
    match part {
        PipelinePart::VaeDecoder => vae(Part::VaeDecoder { latents }),
        PipelinePart::VaeEncoder => vae(Part::VaeEncoder { latents }),
        PipelinePart::TextEncoder | PipelinePart::TextEncoder2 => {
            let name = part.to_string();
            let lacks = || Error::Argument(format!("{} has no {name}", model.root().display()));
            let found = model.text_encoders.iter().find(|text| text.encoder == name).ok_or_else(lacks)?;
            let weights = model.text_network(found)?;
            let weights = PartWeights { weights: weights.stored(), config: found.config_entries() };
            write_part(Part::TextEncoder, weights, label, out, progress)
        }
    }
}
