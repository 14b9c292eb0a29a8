//! Core ML's file types, for prost.
//!
//! `Model.proto` and `MIL.proto` hold the messages of coremltools 9.0 that an ML Program needs
//! (BSD-3-clause, `LICENSE.txt`). The two Rust files are what prost-build 0.14 makes of them, with
//! protox as the compiler and `btree_map(["."])`, which fixes the order of map entries and with it
//! the bytes.

/// `Model.proto`.
#[allow(missing_docs, clippy::all)]
pub mod specification {
    include!("specification.rs");
    /// `MIL.proto`.
    pub mod mil_spec {
        include!("mil_spec.rs");
    }
}

pub use specification::mil_spec;
