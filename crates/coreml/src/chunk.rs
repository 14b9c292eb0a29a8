//! What a package's metadata says about a chunk of a UNet.

use sdxl_model::unet::UnetChain;
use serde::{Deserialize, Serialize};

use super::portion::Portion;
use super::proto::specification::Metadata;

/// The metadata key of a chunk: which of the UNet's parts it computes.
pub(super) const CHUNK: &str = "sdxl-squeeze.chunk";

/// The chunks of a UNet.
pub(super) const CHUNKS: usize = 2;

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

/// The names of a portion's parts.
pub(super) fn names(portion: &Portion) -> Vec<String> {
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
