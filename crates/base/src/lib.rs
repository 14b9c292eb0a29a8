//! The ground floor of sdxl-squeeze: errors, progress reports, bounded reading, atomic writing.
//!
//! Nothing here knows of tensors, models or compression. The feature `torch` only lets libtorch's
//! errors become an [`Error`].

pub mod allocator;
pub mod digest;
pub mod error;
pub mod input;
pub mod memory;
pub mod number;
pub mod output;
pub mod pattern;
pub mod progress;
pub mod safetensors_file;
pub mod shorten;

pub use error::{Bug, Error, Mistake, Place, Result};
