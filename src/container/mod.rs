//! The compressed UNet in one file, `unet.squeezed.safetensors`.
//!
//! The file is a plain safetensors file: each compressed weight lies in it as a packed mask, packed
//! palette indices, palettes and scales, each uncompressed tensor as fp16 under its own name.
//! `docs/container.md` defines every byte, so that other programs can read it. The parts are those
//! of Core ML's `constexpr_lut_to_dense`, `constexpr_lut_to_sparse` and
//! `constexpr_sparse_to_dense`.

mod half_bytes;
mod metadata;
mod packed;
mod reader;
mod verify;
mod weight;
mod writer;

pub use metadata::{ContainerInfo, FORMAT, VERSION};
pub use packed::{Mask, Packed};
pub use reader::{Container, StoredLayer};
pub use verify::Verification;
pub use weight::{CompressedWeight, Values};
pub use writer::{ContainerWriter, Written};

pub use crate::input::SourceFile;
