//! The types that describe a compressed weight: index widths, palettes and their groups, sparsity.
//!
//! Every module that compresses, stores, reads or configures weights uses these types. They do not
//! depend on a tensor library, a file format or a model.

mod bit_width;
mod book;
mod effort;
mod grouping;
mod layer_kind;
mod options;
mod prune_method;
mod quantizer;
mod scales;
mod sparsity;

pub use bit_width::BitWidth;
pub use book::Codebook;
pub use effort::Effort;
pub use grouping::{Grouping, Misfit, OnMisfit};
pub use layer_kind::LayerKind;
pub use options::{PaletteOptions, PruneOptions};
pub use prune_method::PruneMethod;
pub use quantizer::{Grid, Quantizer};
pub use scales::Scales;
pub use sparsity::{NmRatio, Sparsity};
