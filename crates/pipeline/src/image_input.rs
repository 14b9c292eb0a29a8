//! Pictures and masks as inputs of a UNet and of a run.

use sdxl_model::vae::VaeEncoder;
use squeeze_base::error::Result;
use squeeze_numerics::device::Placement;
use squeeze_numerics::random::Generator;
use tch::{Kind, Tensor};

use super::folder::PipelineFolder;
use super::prompt::Guidance;

/// A pipeline's VAE encoder, which makes the latents of pictures. It computes in fp32, as diffusers
/// does for SDXL, whose VAE overflows in fp16.
#[derive(Debug)]
pub struct PictureEncoder {
    vae: VaeEncoder,
    placement: Placement,
    /// Whether an edit model is shown scaled latents (CosXL) or unscaled ones (InstructPix2Pix).
    scales_shown: bool,
}

impl PictureEncoder {
    /// Loads the encoder; latents get the dtype of `placement`.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn load(folder: &PipelineFolder, placement: Placement) -> Result<Self> {
        let weights = folder.vae_network()?;
        weights.stored().check_against(&VaeEncoder::tensors(&folder.vae)?, &VaeEncoder::is_unused)?;
        let vae = VaeEncoder::load(&folder.vae, weights.source(Placement { kind: Kind::Float, ..placement }).as_ref())?;
        Ok(PictureEncoder { vae, placement, scales_shown: folder.is_cosxl_edit })
    }

    /// The scaled latents [1, c, h, w] of a picture [1, 3, h scale, w scale] in [-1, 1], drawn from
    /// their distribution.
    ///
    /// # Errors
    /// If libtorch refuses an operation.
    pub fn latents(&self, picture: &Tensor, generator: &mut Generator) -> Result<Tensor> {
        let distribution = self.vae.forward(&picture.f_to_device(self.placement.device)?)?;
        let noise = generator.draw(&distribution.mean.size(), Kind::Float)?.f_to_device(self.placement.device)?;
        self.vae.scale(&distribution.draw(&noise)?.f_to_kind(self.placement.kind)?)
    }

    /// The channels of an inpainting model, [1, 1 + c, h, w]: the mask [1, 1, h scale, w scale] at
    /// the latents' size, and the latents of the picture with grey in place of what it covers.
    ///
    /// # Errors
    /// If libtorch refuses an operation.
    pub fn masked(&self, picture: &Tensor, mask: &Tensor, generator: &mut Generator) -> Result<Tensor> {
        let outside = picture.f_mul(&mask.f_lt(0.5)?.f_to_kind(Kind::Float)?)?;
        let latents = self.latents(&outside, generator)?;
        Ok(Tensor::f_cat(&[self.mask(mask, &latents)?, latents], 1)?)
    }

    /// The mask [1, 1, h scale, w scale] at the size of latents [1, c, h, w]: the value of the
    /// first pixel of each square.
    ///
    /// # Errors
    /// If libtorch refuses an operation.
    pub fn mask(&self, mask: &Tensor, latents: &Tensor) -> Result<Tensor> {
        let (_, _, height, width) = latents.size4()?;
        let small = mask.f_upsample_nearest2d([height, width], None, None)?;
        Ok(small.f_to_device(self.placement.device)?.f_to_kind(self.placement.kind)?)
    }

    /// The channels of an edit model: the means of a picture's latents, [1, c, h, w].
    ///
    /// # Errors
    /// If libtorch refuses an operation.
    pub fn shown(&self, picture: &Tensor) -> Result<Tensor> {
        let mean = self.vae.forward(&picture.f_to_device(self.placement.device)?)?.mean.f_to_kind(self.placement.kind)?;
        Ok(if self.scales_shown { mean.f_mul_scalar(self.vae.config().scaling_factor)? } else { mean })
    }
}

impl Guidance {
    /// The same guidance of a UNet that is given `channels` [1, k, h, w] beside the noisy latents.
    /// Where three predictions are made, the last is made without a picture.
    ///
    /// # Errors
    /// If libtorch refuses an operation.
    pub fn with_image(&self, channels: &Tensor) -> Result<Guidance> {
        let rows = self.rows()?;
        let image = match self.image_scale {
            Some(_) => Tensor::f_cat(&[channels, channels, &channels.f_zeros_like()?], 0)?,
            None => channels.f_repeat([rows, 1, 1, 1])?,
        };
        Ok(Guidance { conditioning: self.conditioning.shallow_clone(), image: Some(image), ..*self })
    }
}
