//! What a bundle is made of.

use squeeze_coreml::{Label, Layout};

use crate::export::PipelinePart;

/// The choices for a bundle.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BundleOptions {
    /// Height and width of the latents.
    pub latents: [i64; 2],
    /// How the UNet's transformers compute.
    pub layout: Layout,
    /// Whether the UNet is written as two packages ([`squeeze_coreml::write_chunks`]).
    pub chunked: bool,
    /// Whether the VAE's encoder is written, which image to image needs.
    pub vae_encoder: bool,
    /// The packages' own fields.
    pub label: Label,
}

/// A package of a bundle.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Named {
    /// Its name without the ending: Swift looks for it under this name.
    pub name: &'static str,
    /// Its network; `None` for the UNet or a chunk of it.
    pub part: Option<PipelinePart>,
}
