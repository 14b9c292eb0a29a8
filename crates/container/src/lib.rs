//! A compressed network in one file: `unet.squeezed.safetensors`, for example.
//!
//! [`Container`] reads one, [`ContainerWriter`] writes one, and [`CompressedWeight`] is a weight in
//! memory. Nothing here knows of libtorch or of a network: `pipeline::UnetWeights` builds a UNet
//! from a container.
//!
//! The format follows, as `docs/container.md` defines it. The parts of a weight are the parameters
//! of Core ML's `constexpr_lut_to_dense`, `constexpr_lut_to_sparse` and
//! `constexpr_sparse_to_dense`.
//!
#![doc = include_str!("../../../docs/container.md")]

mod half_bytes;
mod look_up;
mod metadata;
mod packed;
mod reader;
mod vectors;
mod verify;
mod weight;
mod writer;

pub use metadata::{ContainerInfo, FORMAT, Network, VERSION};
pub use packed::{Mask, Packed};
pub use reader::{Container, StoredLayer, is_container};
pub use squeeze_base::input::SourceFile;
pub use verify::Verification;
pub use weight::{CompressedWeight, Values};
pub use writer::{ContainerWriter, Written};
