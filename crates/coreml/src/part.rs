//! Packages of a pipeline's text encoders and VAE.

use std::collections::BTreeMap;
use std::path::Path;

use sdxl_model::checkpoint::ConfigFile;
use sdxl_model::text::{ClipText, TextConfig};
use sdxl_model::vae::{VaeConfig, VaeDecoder, VaeEncoder};
use sdxl_pipeline::StoredNetwork;
use serde_json::{Map, Value, json};
use squeeze_base::error::{Error, Result};
use squeeze_base::progress::Progress;

use super::blob::BlobFile;
use super::lower::{compute_element, lower_decoder, lower_encoder, lower_text_encoder};
use super::options::LARGEST;
use super::package::{
    TEXT_ENCODER_CONFIG, VAE_DECODER_CONFIG, VAE_ENCODER_CONFIG, WEIGHTS_HASH, WrittenPackage, check_name, version, write_program,
};
use super::program::MAIN;
use super::proto::specification::Metadata;

/// A network of a pipeline beside the UNet, with inputs and outputs as Apple's Swift pipeline has
/// them. Shapes in a package are fixed, and its batch is 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// A CLIP text encoder: `input_ids` [1, tokens] in fp32 to `hidden_embeds` [1, tokens, width]
    /// and `pooled_outputs` [1, width], both in fp32. It is computed in fp16.
    TextEncoder,
    /// The VAE's decoder: unscaled latents `z` [1, c, h, w] to `image` [1, 3, h scale, w scale] in
    /// fp32. It is computed in fp32, and `z` is in fp32, where the VAE's config has `force_upcast`;
    /// else in fp16.
    VaeDecoder {
        /// Height and width of the latents.
        latents: [i64; 2],
    },
    /// The VAE's encoder: a picture `x` [1, 3, h scale, w scale] in fp32 to `latent` [1, 2c, h, w]
    /// in fp32, means and logarithms of variances. It is computed as the decoder is.
    VaeEncoder {
        /// Height and width of the latents.
        latents: [i64; 2],
    },
}

/// A part's weights and its `config.json`. A VAE's are those of both halves.
#[derive(Clone, Copy)]
pub struct PartWeights<'a> {
    /// The weights: dense ones are stored as fp16, compressed ones stay compressed.
    pub weights: &'a dyn StoredNetwork,
    /// The entries of the config.
    pub config: &'a Map<String, Value>,
}

/// A package's own fields.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Label {
    /// The author.
    pub author: String,
    /// The licence.
    pub license: String,
}

/// Writes a part as the new package `out`, whose name ends in `.mlpackage`.
///
/// Weights are copied one at a time. Equal input gives equal bytes.
///
/// # Errors
/// [`Error::Argument`] if `out` exists; [`Error::Range`] for a size that Core ML cannot have;
/// [`Error::ConfigKey`] if the architecture is not implemented; [`Error::Tensors`] naming the
/// tensors that are missing, misshapen or surplus; if a weight cannot be read, or has a value that
/// fp16 does not hold; [`Error::Write`]. Then there is no package.
pub fn write_part(
    part: Part,
    weights: PartWeights,
    label: &Label,
    out: &Path,
    progress: &dyn Progress,
) -> Result<WrittenPackage> {
    check_name(out)?;
    let PartWeights { weights, config } = weights;
    let file = ConfigFile::from_entries(weights.path(), config.clone());
    match part {
        Part::TextEncoder => {
            let text = TextConfig::parse(file)?;
            check_text(weights, &text)?;
            let lower = |_, program| lower_text_encoder(&text, &weights, program, progress);
            let about = "A text encoder of an SDXL pipeline: token ids to states and pooled text";
            write_program(out, &[MAIN], lower, |blobs, _| metadata(about, TEXT_ENCODER_CONFIG, "fp16", config, label, blobs))
        }
        Part::VaeDecoder { latents } => {
            let vae = VaeConfig::parse(file)?;
            check_latents(latents, &vae)?;
            let compute = compute_element(&vae).to_string();
            weights.check_against(&VaeDecoder::tensors(&vae)?, &VaeDecoder::is_unused)?;
            let lower = |_, program| lower_decoder(&vae, &weights, latents, program, progress);
            let about = "The decoder of an SDXL pipeline's VAE: unscaled latents to a picture with values from -1 to 1";
            write_program(out, &[MAIN], lower, |blobs, _| metadata(about, VAE_DECODER_CONFIG, &compute, config, label, blobs))
        }
        Part::VaeEncoder { latents } => {
            let vae = VaeConfig::parse(file)?;
            check_latents(latents, &vae)?;
            let compute = compute_element(&vae).to_string();
            weights.check_against(&VaeEncoder::tensors(&vae)?, &VaeEncoder::is_unused)?;
            let lower = |_, program| lower_encoder(&vae, &weights, latents, program, progress);
            let about = "The encoder of an SDXL pipeline's VAE: a picture with values from -1 to 1 to unscaled latents";
            write_program(out, &[MAIN], lower, |blobs, _| metadata(about, VAE_ENCODER_CONFIG, &compute, config, label, blobs))
        }
    }
}

/// Checks that exactly an encoder's tensors are there. The file of an encoder without a projection
/// may have one that is unused.
fn check_text(weights: &dyn StoredNetwork, config: &TextConfig) -> Result<()> {
    let pools = config.projection_dim.is_some();
    weights.check_against(&ClipText::tensors(config)?, &|name| {
        ClipText::is_unused(name) || (!pools && name == "text_projection.weight")
    })
}

/// Checks the size of latents, and of their picture.
fn check_latents(latents: [i64; 2], vae: &VaeConfig) -> Result<()> {
    let highest = LARGEST / vae.scale().min(8);
    match latents.into_iter().find(|size| !(1..=highest).contains(size)) {
        Some(size) => Err(Error::range("the size of the latents", size, format!("between 1 and {highest}"))),
        None => Ok(()),
    }
}

/// The package's own fields.
fn metadata(about: &str, key: &str, compute: &str, config: &Map<String, Value>, label: &Label, blobs: &BlobFile) -> Metadata {
    let entries = [
        (WEIGHTS_HASH, blobs.sha256.clone()),
        (key, Value::Object(config.clone()).to_string()),
        ("sdxl-squeeze.compute", compute.to_owned()),
        ("sdxl-squeeze.sizes", json!({ "weight_bin_bytes": blobs.bytes }).to_string()),
    ];
    Metadata {
        short_description: about.to_owned(),
        version_string: version(),
        author: label.author.clone(),
        license: label.license.clone(),
        user_defined: BTreeMap::from(entries.map(|(key, value)| (key.to_owned(), value))),
    }
}
