//! Fuzz targets for all kinds of files that sdxl-squeeze reads.
//!
//! A target turns its input into a file, reads the file through the public interface of the
//! library, and checks properties of the result if the library accepts the file. A panic, an abort,
//! more than ten seconds or more than 2 GiB for one input is a fault of the library. An error is
//! not a fault.
//!
//! A check of hashes refuses nearly every mutated file. The targets for containers and packages
//! therefore also compute correct hashes of mutated content, so that the code behind this check is
//! reached.

pub mod choices;
pub mod config_json;
pub mod container;
pub mod edit;
pub mod layout;
mod limit;
pub mod lora;
pub mod package;
pub mod prompts;
pub mod safetensors;
pub mod samples;
pub mod scratch;
pub mod single_file;
pub mod yaml;
