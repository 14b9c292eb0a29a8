//! Core ML packages: against coremltools' own, against the UNet in Rust, and with faults.
//!
//! What needs Python is in `tests/golden/check_coreml.py`.

mod buffers;
mod faults;
mod file;
mod flips;
mod interpreter;
pub(crate) mod made_up;
mod write;
