//! A UNet in two packages, each of which a phone can load where the whole is too large.

use std::path::Path;

use sdxl_model::unet::UnetChain;
use sdxl_pipeline::UnetWeights;
use serde::{Deserialize, Serialize};
use squeeze_base::error::Result;
use squeeze_base::progress::Progress;

use super::options::Options;
use super::package::{WrittenPackage, check_name, check_scales, write_portion};
use super::portion::Portion;
use super::proto::specification::Metadata;

/// The metadata key of a chunk: which of the UNet's parts it computes.
pub(super) const CHUNK: &str = "sdxl-squeeze.chunk";

/// The chunks of a UNet.
const CHUNKS: usize = 2;

/// A chunk in a package's metadata.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    /// 1 or 2.
    number: usize,
    /// 2.
    of: usize,
    /// The parts of the chain, in order.
    parts: Vec<String>,
}

/// One of two packages that were written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct WrittenChunk {
    /// The parts of the UNet that the package computes, in order: `head` (conv_in and the
    /// embeddings), stages by their names in the checkpoint, `tail` (norm and conv_out).
    pub parts: Vec<String>,
    /// The package.
    #[serde(flatten)]
    pub package: WrittenPackage,
}

/// Writes the UNet of `weights` as two new packages, as Apple's Swift pipeline runs them
/// (apple/ml-stable-diffusion, `chunk_mlprogram.py`, `ManagedMLModel.swift`): it feeds the first its
/// own inputs, and the second these and the first's outputs, by their names.
///
/// The UNet is cut between two of its parts (the input block, the stages, the output block), where
/// the bytes of the stored weights are halved most nearly. The first package passes on, in fp32, the
/// image features `hidden_states` (unless they are the newest skip connection), the skip connections
/// that are left `down_block_res_samples_N`, [b, c, h, w], and the embedding after its SiLU
/// `silu_temb`, [b, c] or [b, c, 1, 1]. The second reads these, and the text states if it has a
/// transformer. Every weight is in one of the packages.
///
/// # Errors
/// As [`write`](super::write). If the second package cannot be written, the first is left: write
/// both into a new folder that appears when it is whole.
pub fn write_chunks(
    weights: UnetWeights,
    options: &Options,
    out: [&Path; CHUNKS],
    progress: &dyn Progress,
) -> Result<[WrittenChunk; CHUNKS]> {
    let chain = weights.chain()?;
    out.into_iter().try_for_each(check_name)?;
    options.check(chain.config())?;
    check_scales(weights)?;
    let [first, second] = Portion::halves(&chain, weights)?;
    let write = |portion: &Portion, out: &Path| -> Result<WrittenChunk> {
        let package = write_portion((&chain, portion), weights, options, out, progress)?;
        Ok(WrittenChunk { parts: names(portion), package })
    };
    Ok([write(&first, out[0])?, write(&second, out[1])?])
}

/// The names of a portion's parts.
fn names(portion: &Portion) -> Vec<String> {
    portion.parts().iter().map(ToString::to_string).collect()
}

/// Says in a package's own fields that it is a chunk, and which.
pub(super) fn describe_chunk(metadata: &mut Metadata, portion: &Portion) {
    let number = if portion.begins() { 1 } else { CHUNKS };
    let entry = Entry { number, of: CHUNKS, parts: names(portion) };
    metadata.short_description = format!("Chunk {number} of {CHUNKS}. {}", metadata.short_description);
    let entry = serde_json::to_string(&entry).expect("numbers and names are JSON");
    metadata.user_defined.insert(CHUNK.to_owned(), entry);
}

/// The portion that the metadata's `entry` names.
///
/// # Errors
/// If the entry is damaged, or is not one of two chunks of this chain.
pub(super) fn read_chunk(entry: &str, chain: &UnetChain) -> Result<Portion, String> {
    let Entry { number, of, parts } = serde_json::from_str(entry).map_err(|why| format!("`{CHUNK}`: {why}"))?;
    let portion = Portion::named(chain, &parts);
    let portion = portion.ok_or_else(|| format!("`{CHUNK}`: {parts:?} are not consecutive parts of this UNet"))?;
    let expected = match (portion.begins(), portion.ends()) {
        (true, false) => 1,
        (false, true) => CHUNKS,
        _ => return Err(format!("`{CHUNK}`: {parts:?} neither begin nor end this UNet alone")),
    };
    if (number, of) != (expected, CHUNKS) {
        return Err(format!("`{CHUNK}`: {parts:?} are chunk {expected} of {CHUNKS}, not {number} of {of}"));
    }
    Ok(portion)
}
