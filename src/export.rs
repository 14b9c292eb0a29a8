//! Exports a UNet's weights to the formats of other programs.

mod coremltools;
mod diffusers;
mod single_file;

pub use coremltools::{Moved, SmallWeights, coremltools};
pub use diffusers::diffusers;
pub use single_file::single_file;
