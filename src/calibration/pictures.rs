//! Pictures and masks for the calibration of inpainting and edit models.

use sdxl_model::vae::VaeDecoder;
use sdxl_pipeline::{Guidance, ImageChannels, PictureEncoder, PipelineFolder, load_vae};
use squeeze_base::error::Result;
use squeeze_numerics::device::Placement;
use squeeze_numerics::random::Generator;
use tch::{Device, Kind, Tensor};

/// The pictures that a model is shown on its calibration runs, made by the model itself.
///
/// Prompts are run in pairs. The first of a pair is shown a grey picture, all of which its mask has
/// drawn anew. The second is shown the picture that the first became; its mask is a rectangle. So
/// both uses are calibrated, drawing from nothing and into a picture, and no picture has to be
/// given.
pub(crate) struct PicturesInTurn {
    channels: ImageChannels,
    encoder: PictureEncoder,
    decoder: VaeDecoder,
    size: (i64, i64),
    /// The picture of the latest run: [1, 3, h, w] in [-1, 1].
    latest: Option<Tensor>,
}

/// What the report says of such a calibration.
pub(crate) const NOTE: &str = "the UNet takes a picture: of every two prompts, the first was shown a grey one (a mask covers all of \
                               it), the second the first one's result (a mask covers a rectangle)";

impl PicturesInTurn {
    /// Loads what makes the pictures; `None` for a model that takes none.
    ///
    /// # Errors
    /// If the VAE cannot be read.
    pub(crate) fn load(folder: &PipelineFolder, size: (i64, i64), placement: Placement) -> Result<Option<Self>> {
        let channels = folder.image_channels();
        if channels == ImageChannels::None {
            return Ok(None);
        }
        tracing::info!("{NOTE}");
        let encoder = PictureEncoder::load(folder, placement)?;
        Ok(Some(PicturesInTurn { channels, encoder, decoder: load_vae(folder, placement)?, size, latest: None }))
    }

    /// The guidance of the run `index` with the channels of its picture, whose latents are drawn
    /// from `seed`.
    ///
    /// # Errors
    /// If libtorch refuses an operation.
    pub(crate) fn show(&self, guidance: &Guidance, index: usize, seed: u64) -> Result<Guidance> {
        let (height, width) = self.size;
        let on_cpu = (Kind::Float, Device::Cpu);
        let (picture, mask) = match self.latest.as_ref().filter(|_| index % 2 == 1) {
            Some(latest) => (latest.shallow_clone(), rectangle(index, self.size)?),
            None => (Tensor::f_zeros([1, 3, height, width], on_cpu)?, Tensor::f_ones([1, 1, height, width], on_cpu)?),
        };
        let mut generator = Generator::new(seed);
        guidance.with_image(&match self.channels {
            ImageChannels::MaskAndPicture => self.encoder.masked(&picture, &mask, &mut generator)?,
            ImageChannels::Picture | ImageChannels::None => self.encoder.shown(&picture)?,
        })
    }

    /// Keeps the picture of the run's final `latents` for the next.
    ///
    /// # Errors
    /// If libtorch refuses an operation.
    pub(crate) fn keep(&mut self, latents: &Tensor) -> Result<()> {
        let decoded = self.decoder.forward(&self.decoder.unscale(&latents.f_to_kind(Kind::Float)?)?)?;
        self.latest = Some(decoded.f_clamp(-1.0, 1.0)?.f_to_device(Device::Cpu)?);
        Ok(())
    }
}

/// A mask with ones in a rectangle, [1, 1, h, w]. Its sides are between a quarter and three
/// quarters of the picture's, and it lies anywhere.
fn rectangle(index: usize, (height, width): (i64, i64)) -> Result<Tensor> {
    // Powers of the plastic number spread points evenly over a square (Roberts 2018, sequence R2).
    let along = |step: f64, shift: f64| (step * index as f64 + shift).fract();
    let side = |length: i64, share: f64| (length as f64 * (0.25 + 0.5 * share)) as i64;
    let (high, wide) = (side(height, along(0.754_877_666_2, 0.0)), side(width, along(0.569_840_291, 0.0)));
    let top = ((height - high) as f64 * along(0.569_840_291, 0.5)) as i64;
    let left = ((width - wide) as f64 * along(0.754_877_666_2, 0.5)) as i64;
    let mask = Tensor::f_zeros([1, 1, height, width], (Kind::Float, Device::Cpu))?;
    let _filled = mask.f_narrow(2, top, high)?.f_narrow(3, left, wide)?.f_fill_(1.0)?;
    Ok(mask)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rectangles_lie_inside_and_differ() {
        let size = (64, 96);
        let mut seen = Vec::new();
        for index in 0..20 {
            let mask = rectangle(index, size).unwrap();
            assert_eq!(mask.size(), [1, 1, 64, 96]);
            let share = mask.mean(Kind::Float).double_value(&[]);
            assert!((0.06..0.57).contains(&share), "{share}");
            assert!(!seen.contains(&mask));
            seen.push(mask);
        }
    }
}
