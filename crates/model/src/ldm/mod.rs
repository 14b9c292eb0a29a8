//! Single-file checkpoints, as the LDM and sgm repositories and most fine-tunes are published:
//! UNet, VAE and text encoders in one safetensors file, under names of their own.
//!
//! A checkpoint is told apart by its tensors ([`SingleFile`]). Its tensors are read through views
//! ([`Names`]): no converted copy is written.

mod family;
mod names;
mod part_configs;
mod refusal;
mod single_file;
mod unet_config;
mod vae_file;

pub use family::{Family, Prediction};
pub use names::Names;
pub use single_file::{MARKERS, SingleFile, Skipped};
pub use vae_file::VaeFile;
