//! The files of a diffusers folder: configs and safetensors.

mod config_file;
mod source;
mod tensor;
mod weights;

pub use config_file::ConfigFile;
pub use source::{Blueprint, TensorSource, TensorSpec};
pub use tensor::{TensorBytes, halves, read_tensor};
pub(crate) use weights::check_tensors;
pub use weights::{Weights, WeightsSource};

pub use crate::input::SourceFile;
pub(crate) use crate::input::SteadyFile;
pub use crate::safetensors_file::{Entry, SafetensorsFile};
