//! What lies in a diffusers folder: config files and safetensors.

mod config_file;
mod magnitudes;
mod safetensors_file;
mod source;
mod source_file;
mod steady_file;
mod weights;

pub use config_file::ConfigFile;
pub use safetensors_file::{Entry, SafetensorsFile};
pub use source::{Blueprint, TensorSource, TensorSpec};
pub use source_file::SourceFile;
pub(crate) use steady_file::SteadyFile;
pub(crate) use weights::check_tensors;
pub use weights::{Weights, WeightsSource};
