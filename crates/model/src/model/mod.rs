//! SDXL's networks and samplers. Nothing in this module depends on compression.

mod layer;
mod network;
mod resnet;
pub mod scheduler;
pub mod text;
#[cfg(test)]
mod threads;
pub mod unet;
pub mod vae;

pub use layer::{ConvGeometry, Layer, LayerInput, Observer, Operation, Unobserved};
pub use resnet::ResnetShape;
