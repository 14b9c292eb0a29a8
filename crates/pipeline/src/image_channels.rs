//! Kinds of models by the pictures that they take.

use sdxl_model::unet::UnetConfig;

/// The channels that a UNet takes beside the noisy latents.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ImageChannels {
    /// None: the UNet draws from text alone.
    None,
    /// A mask, and the latents of the picture outside of it: an inpainting model.
    MaskAndPicture,
    /// The latents of a picture: an edit model (Brooks et al. 2023, InstructPix2Pix).
    Picture,
}

impl ImageChannels {
    /// The channels of a UNet with `inputs` channels in, for latents of `latents` channels; `None`
    /// for a number that no known kind of model has.
    #[must_use]
    pub fn of(inputs: i64, latents: i64) -> Option<Self> {
        match inputs - latents {
            0 => Some(ImageChannels::None),
            beside if beside == latents + 1 => Some(ImageChannels::MaskAndPicture),
            beside if beside == latents => Some(ImageChannels::Picture),
            _ => None,
        }
    }

    /// The rows of each call of the UNet for one picture: with guidance 2, or 3 of an edit model,
    /// except for a UNet that is told the guidance scale.
    #[must_use]
    pub fn rows(self, unet: &UnetConfig, guidance: f64) -> i64 {
        if guidance <= 1.0 || unet.time_cond_proj_dim.is_some() {
            return 1;
        }
        match self {
            ImageChannels::None | ImageChannels::MaskAndPicture => 2,
            ImageChannels::Picture => 3,
        }
    }
}
