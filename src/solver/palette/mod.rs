//! Grouped palettes: each group of channels shares 2^n fp16 values, and each weight is an index
//! into them.
//!
//! Groups, scales and palettes are those of coremltools' `PostTrainingPalettizer`
//! (`optimize/torch/palettization/post_training_palettization.py`), with two differences. Pruned
//! weights take no part: they have no palette entry and decode to exactly zero, where coremltools
//! spends one entry on them and moves it a little off zero. And nothing is rounded before
//! clustering but to fp16.
//!
//! The palette of a group is the optimum, not a local one: see [`optimal_palette`].

mod histogram;
mod layout;
mod palettized;
mod partition;
mod solve;
mod values;

pub use palettized::Palettized;
pub use solve::{palettize, palettize_weighted};
pub use values::{Bucket, optimal_palette};
