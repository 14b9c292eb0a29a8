//! Core ML packages, written and checked without a Mac. See [`coreml`].

pub mod coreml;
