//! Core ML packages: the networks of an SDXL pipeline as ML Programs (iOS 18, macOS 15), the UNet's
//! compressed weights unchanged.
//!
//! A package consists of a manifest, the program (`model.mlmodel`, protobuf) and the weights
//! (`weight.bin`). Writing one needs no part of Core ML. The operations, their parameters and their
//! order follow coremltools 9.0 for the same network; `docs/coreml.md` describes how that is
//! checked.

mod blob;
mod check;
mod chunk;
mod chunks;
mod constants;
mod description;
mod element;
mod infer;
mod literal;
mod lower;
mod lut;
mod manifest;
mod operand;
mod options;
mod package;
mod part;
mod portion;
mod program;
pub mod proto;
mod weights;

pub use check::{PackageVerification, VerifiedFunction, verify};
pub use chunks::{WrittenChunk, write_chunks};
pub use constants::DenseConstant;
pub use element::{ArrayType, Element};
pub use lut::Lut;
pub use options::{FunctionSize, Io, Layout, Options};
pub use package::{VECTORS_NEED, WrittenPackage, check_scales, write};
pub use part::{Label, Part, PartWeights, write_part};
