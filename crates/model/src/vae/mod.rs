//! The VAE that turns latents into pictures, and pictures into latents.

mod config;
mod decoder;
mod encoder;

pub use config::VaeConfig;
pub use decoder::VaeDecoder;
pub use encoder::{LatentDistribution, VaeEncoder};
