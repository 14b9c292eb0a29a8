//! Core ML packages, compared with those of coremltools and with the UNet in Rust, and tested with
//! faults.
//!
//! `tests/golden/check_coreml.py` has the tests that need Python.

mod buffers;
mod faults;
mod file;
mod flips;
mod interpreter;
pub(crate) mod made_up;
mod write;
