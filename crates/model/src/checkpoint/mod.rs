//! The files of a diffusers folder: configs and safetensors.

mod config_file;
pub mod lora;
mod prefetched;
mod source;
mod tensor;
mod view;
mod weights;

pub use config_file::ConfigFile;
pub use prefetched::Prefetched;
pub use source::{Blueprint, TensorSource, TensorSpec};
pub use squeeze_base::input::SourceFile;
pub use squeeze_base::input::SteadyFile;
pub use squeeze_base::safetensors_file::{Entry, SafetensorsFile};
pub use tensor::{TensorBytes, halves, read_tensor};
pub use view::View;
pub use weights::check_tensors;
pub use weights::{Weights, WeightsSource};
