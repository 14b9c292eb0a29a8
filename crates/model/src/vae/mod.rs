//! The VAE that turns latents into pictures.

mod config;
mod decoder;
mod encoder;

pub use config::VaeConfig;
pub use decoder::VaeDecoder;
pub use encoder::encoder_tensors;
