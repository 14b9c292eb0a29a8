//! SDXL on libtorch: UNet, text encoders, VAE, schedulers, and the checkpoints that they come from.
//! Nothing here knows of compression.

pub mod checkpoint;
pub mod model;
