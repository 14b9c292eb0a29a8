//! Fuzz targets for everything that sdxl-squeeze reads from a file.
//!
//! A target turns bytes into a file, reads it through the library's public interface, and checks
//! what must hold of whatever was accepted. A panic, an abort, more than ten seconds or more than 2
//! GiB for one input is a fault of the library. Errors are what is expected.
//!
//! Hashes would stop nearly every mutated file at the door. So the targets for containers and
//! packages also compute the hashes of what they mutate, and the code behind the hashes is reached.

pub mod choices;
pub mod config_json;
pub mod container;
pub mod edit;
pub mod layout;
mod limit;
pub mod package;
pub mod prompts;
pub mod safetensors;
pub mod samples;
pub mod scratch;
pub mod yaml;
