//! Grouped palettes: each group of channels shares 2^n fp16 values, and each weight is an index
//! into them.
//!
//! Groups, scales and palettes are those of coremltools' `PostTrainingPalettizer`
//! (`optimize/torch/palettization/post_training_palettization.py`), with two differences. Pruned
//! weights are excluded: they have no palette entry and decode to exactly zero, whereas coremltools
//! uses one entry for them, which is not exactly zero. Before clustering, values are rounded to
//! fp16 only.
//!
//! The palette of a group is a global optimum, not a local one: see [`optimal_palette`].

mod histogram;
mod layout;
mod on_device;
mod palettized;
mod partition;
mod path;
mod rounding;
mod solve;
mod values;
mod vectors;

pub(crate) use on_device::values_of;
pub use on_device::{decode_on_device, palettize_on_device, palettizes_on_device};
pub use palettized::Palettized;
pub(crate) use rounding::{Rounding, largest, nearest};
pub(crate) use solve::palettize_from;
pub use solve::{palettize, palettize_weighted};
pub use values::{Bucket, optimal_palette};
pub(crate) use vectors::{STARTS, VectorTable};
