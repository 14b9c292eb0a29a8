//! A UNet in two packages, each of which a phone can load where the whole is too large.

use std::path::Path;

use sdxl_pipeline::UnetWeights;
use serde::Serialize;
use squeeze_base::error::Result;
use squeeze_base::progress::Progress;

use super::chunk::{self, CHUNKS};
use super::options::Options;
use super::package::{WrittenPackage, check_name, check_scales, write_portion};
use super::portion::Portion;

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
/// (apple/ml-stable-diffusion, `chunk_mlprogram.py`, `ManagedMLModel.swift`): it feeds the first
/// its own inputs, and the second these and the first's outputs, by their names.
///
/// The UNet is cut between two of its parts (the input block, the stages, the output block), where
/// the bytes of the stored weights are halved most nearly. The first package passes on, in fp32,
/// the image features `hidden_states` (unless they are the newest skip connection), the skip
/// connections that are left `down_block_res_samples_N`, [b, c, h, w], and the embedding after its
/// SiLU `silu_temb`, [b, c] or [b, c, 1, 1]. The second reads these, the text states if it has a
/// transformer, and `sample` and `timestep` if it makes noise of a prediction that is none
/// ([`Options::noise`]). Every weight is in one of the packages.
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
    options.check_all(chain.config())?;
    check_scales(weights)?;
    let [first, second] = Portion::halves(&chain, weights)?;
    let write = |portion: &Portion, out: &Path| -> Result<WrittenChunk> {
        let package = write_portion((&chain, portion), weights, options, out, progress)?;
        Ok(WrittenChunk { parts: chunk::names(portion), package })
    };
    Ok([write(&first, out[0])?, write(&second, out[1])?])
}
