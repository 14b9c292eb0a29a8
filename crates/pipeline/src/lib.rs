//! A diffusers pipeline folder, prompts, the denoising loop, pictures.

pub mod picture;
pub mod pipeline;
