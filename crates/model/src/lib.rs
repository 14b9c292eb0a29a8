//! SDXL on libtorch: UNet, text encoders, VAE, samplers, and the checkpoints that they come from.
//! Nothing here depends on compression.

pub mod checkpoint;
mod layer;
pub mod ldm;
mod network;
mod pieces;
mod resnet;
pub mod scheduler;
pub mod text;
#[cfg(test)]
mod threads;
pub mod unet;
pub mod vae;

pub use layer::{ConvGeometry, Layer, LayerInput, Observer, Operation, Unobserved};
pub use pieces::{Pieces, States};
pub use resnet::ResnetShape;
