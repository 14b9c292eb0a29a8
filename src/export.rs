//! Exports a UNet's weights to the formats of other programs.

mod apple;
mod coremltools;
mod diffusers;
mod single_file;

pub use apple::apple_mismatch;
pub use coremltools::{Moved, SmallWeights, coremltools};
pub use diffusers::diffusers;
pub use single_file::single_file;
