//! Exports a UNet's weights, and a pipeline's other networks, to the formats of other programs.

mod apple;
mod chunks;
mod coremltools;
mod diffusers;
mod part;
mod single_file;

pub use apple::{apple_mismatch, apple_mismatch_of_prediction};
pub(crate) use chunks::coreml_chunks_in;
pub use chunks::{CHUNKS, coreml_chunks};
pub use coremltools::{Moved, SmallWeights, coremltools};
pub use diffusers::diffusers;
pub use part::{PipelinePart, coreml_part};
pub use single_file::single_file;
