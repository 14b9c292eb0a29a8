//! What lies in a diffusers folder: config files and safetensors.

mod config_file;
mod safetensors_file;
mod source;
mod weights;

pub use config_file::ConfigFile;
pub use safetensors_file::{Entry, SafetensorsFile};
pub use source::{Blueprint, TensorSource, TensorSpec};
pub(crate) use weights::check_tensors;
pub use weights::{Weights, WeightsSource};
