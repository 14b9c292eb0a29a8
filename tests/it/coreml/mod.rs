//! Core ML packages, compared with those of coremltools and with the UNet in Rust, and tested with
//! faults.
//!
//! `tests/golden/check_coreml.py` and `tests/golden/check_coreml_parts.py` have the tests that need
//! Python.

mod buffers;
mod bundle;
mod chunk_faults;
mod chunks;
mod faults;
mod file;
mod flips;
mod functions;
mod interpreter;
pub(crate) mod made_up;
mod network_faults;
mod noise_output;
mod part_faults;
mod parts;
mod refiner;
mod swift;
mod write;
