//! The vocabulary of compressed weights: how wide an index is, which weights share a palette, what
//! is pruned.
//!
//! Every other module that compresses, stores, reads or configures weights uses these types. They
//! know of no tensor library, no file format and no model.

mod bit_width;
mod book;
mod effort;
mod grouping;
mod layer_kind;
mod options;
mod prune_method;
mod sparsity;

pub use bit_width::BitWidth;
pub use book::{Codebook, Run};
pub use effort::Effort;
pub use grouping::{Grouping, Misfit, OnMisfit};
pub use layer_kind::LayerKind;
pub use options::{PaletteOptions, PruneOptions};
pub use prune_method::PruneMethod;
pub use sparsity::{NmRatio, Sparsity};
