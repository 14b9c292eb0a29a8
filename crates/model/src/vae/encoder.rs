//! The encoder: from a picture to latents.

use std::ops::Range;

use squeeze_base::error::Result;
use squeeze_numerics::elementwise::silu_in_place;
use tch::Tensor;

use super::config::VaeConfig;
use super::decoder::{Attention, EPS, run_mid_block};
use crate::checkpoint::{Blueprint, TensorSource, TensorSpec};
use crate::layer::{ConvGeometry, Layer, Observer, Unobserved};
use crate::network::{Builder, GroupNorm, LayerId, Run};
use crate::pieces::{Pieces, States};
use crate::resnet::{Resnet, ResnetShape};

/// The encoding half of `diffusers.AutoencoderKL` (Rombach et al. 2022), for pictures of three
/// channels.
#[derive(Debug)]
pub struct VaeEncoder {
    config: VaeConfig,
    layers: Vec<Layer>,
    conv_in: LayerId,
    down_blocks: Vec<DownBlock>,
    mid_resnets: [Resnet; 2],
    mid_attention: Option<Attention>,
    conv_norm_out: GroupNorm,
    conv_out: LayerId,
    quant_conv: Option<LayerId>,
    /// The number of layers up to the end of each piece.
    ends: Vec<usize>,
}

#[derive(Debug)]
struct DownBlock {
    resnets: Vec<Resnet>,
    downsampler: Option<LayerId>,
}

/// The normal distribution of a picture's unscaled latents: both [b, c, h, w].
#[derive(Debug)]
pub struct LatentDistribution {
    /// The mean, which diffusers calls the mode.
    pub mean: Tensor,
    /// The standard deviation.
    pub std: Tensor,
}

impl LatentDistribution {
    /// The latents that unit Gaussian `noise` [b, c, h, w] draws.
    ///
    /// # Errors
    /// If the noise has another shape.
    pub fn draw(&self, noise: &Tensor) -> Result<Tensor> {
        Ok(self.mean.f_add(&self.std.f_mul(noise)?)?)
    }
}

impl VaeEncoder {
    /// Builds the encoder, reading its weights from `source`.
    ///
    /// # Errors
    /// If a tensor is missing or misshapen.
    pub fn load(config: &VaeConfig, source: &dyn TensorSource) -> Result<Self> {
        let mut layers = Vec::new();
        let mut top = Builder::new(source, "", &mut layers);
        let groups = config.norm_num_groups;
        let shape = |input, output| ResnetShape { input, output, temb: None, groups, eps: EPS };
        let same = ConvGeometry::new(1, 1);
        let widths = &config.block_out_channels;
        let deepest = widths[widths.len() - 1];
        let moments = 2 * config.latent_channels;

        let mut encoder = top.at("encoder");
        let conv_in = encoder.conv2d("conv_in", config.out_channels, widths[0], 3, same)?;
        let mut ends = vec![encoder.count()];
        let mut down_blocks = Vec::new();
        for (i, width) in widths.iter().copied().enumerate() {
            let mut block = encoder.at(format_args!("down_blocks.{i}"));
            let before = widths[i.saturating_sub(1)];
            let resnets = (0..config.layers_per_block)
                .map(|k| Resnet::build(&mut block.at("resnets").at(k), shape(if k == 0 { before } else { width }, width)))
                .collect::<Result<_>>()?;
            let downsampler = (i + 1 < widths.len())
                .then(|| block.at("downsamplers.0").conv2d("conv", width, width, 3, ConvGeometry::new(2, 0)))
                .transpose()?;
            down_blocks.push(DownBlock { resnets, downsampler });
            ends.push(block.count());
        }
        let mut mid = encoder.at("mid_block");
        let mid_resnet_0 = Resnet::build(&mut mid.at("resnets.0"), shape(deepest, deepest))?;
        let mid_attention =
            config.mid_block_add_attention.then(|| Attention::build(&mut mid.at("attentions.0"), deepest, groups)).transpose()?;
        let mid_resnet_1 = Resnet::build(&mut mid.at("resnets.1"), shape(deepest, deepest))?;
        ends.push(mid.count());
        let conv_norm_out = encoder.group_norm("conv_norm_out", groups, deepest, EPS)?;
        let conv_out = encoder.conv2d("conv_out", deepest, moments, 3, same)?;
        let quant_conv =
            config.use_quant_conv.then(|| top.conv2d("quant_conv", moments, moments, 1, ConvGeometry::new(1, 0))).transpose()?;
        ends.push(top.count());
        Ok(VaeEncoder {
            config: config.clone(),
            layers,
            conv_in,
            down_blocks,
            mid_resnets: [mid_resnet_0, mid_resnet_1],
            mid_attention,
            conv_norm_out,
            conv_out,
            quant_conv,
            ends,
        })
    }

    /// Every tensor of the encoder.
    ///
    /// # Errors
    /// If libtorch cannot make a tensor at all.
    pub fn tensors(config: &VaeConfig) -> Result<Vec<TensorSpec>> {
        let blueprint = Blueprint::default();
        Self::load(config, &blueprint)?;
        Ok(blueprint.into_tensors())
    }

    /// Whether a tensor belongs to the decoder, which the encoder does not need.
    #[must_use]
    pub fn is_unused(name: &str) -> bool {
        name.starts_with("decoder.") || name.starts_with("post_quant_conv.")
    }

    /// Encodes a picture [b, 3, h, w] with values in [-1, 1] to the distribution of its latents,
    /// [b, c, h / scale, w / scale], which are not scaled.
    ///
    /// # Errors
    /// If libtorch refuses an operation.
    pub fn forward(&self, picture: &Tensor) -> Result<LatentDistribution> {
        let first = picture.shallow_clone();
        let moments = (0..self.ends.len())
            .try_fold(first, |hidden, piece| self.run_piece(piece, States { hidden, ids: None }, &mut Unobserved))?;
        let channels = self.config.latent_channels;
        let log_variance = moments.f_narrow(1, channels, channels)?.f_clamp(-30.0, 20.0)?;
        Ok(LatentDistribution { mean: moments.f_narrow(1, 0, channels)?, std: log_variance.f_mul_scalar(0.5)?.f_exp()? })
    }

    /// Scales latents [b, c, h, w] as the UNet expects them: the inverse of
    /// [`VaeDecoder::unscale`](super::VaeDecoder::unscale).
    ///
    /// # Errors
    /// If libtorch refuses an operation.
    pub fn scale(&self, latents: &Tensor) -> Result<Tensor> {
        let factor = self.config.scaling_factor;
        Ok(match &self.config.latents_mean_std {
            None => latents.f_mul_scalar(factor)?,
            Some((mean, std)) => {
                let across = |values: &[f64]| {
                    Tensor::f_from_slice(values)?
                        .f_view([1, -1, 1, 1])?
                        .f_to_device(latents.device())?
                        .f_to_kind(latents.f_kind()?)
                };
                latents.f_sub(&across(mean)?)?.f_mul_scalar(factor)?.f_div(&across(std)?)?
            }
        })
    }

    /// The architecture.
    #[must_use]
    pub fn config(&self) -> &VaeConfig {
        &self.config
    }
}

/// The pieces are the first convolution, each down block, the mid block, and the last convolutions,
/// whose result is means and logarithms of variances [b, 2c, h, w].
impl Pieces for VaeEncoder {
    fn layers(&self) -> &[Layer] {
        &self.layers
    }

    fn layers_mut(&mut self) -> &mut [Layer] {
        &mut self.layers
    }

    fn pieces(&self) -> Vec<(String, Range<usize>)> {
        let downs = (0..self.down_blocks.len()).map(|index| format!("encoder.down_blocks.{index}"));
        let names = std::iter::once("encoder.conv_in".to_owned()).chain(downs);
        let names = names.chain(["encoder.mid_block".to_owned(), "encoder.conv_out".to_owned()]);
        let begins = std::iter::once(0).chain(self.ends.iter().copied());
        names.zip(begins.zip(&self.ends).map(|(begin, end)| begin..*end)).collect()
    }

    fn run_piece(&self, index: usize, states: States, observer: &mut dyn Observer) -> Result<Tensor> {
        let mut run = Run::new(&self.layers, observer);
        let input = states.hidden;
        let Some(index) = index.checked_sub(1) else { return run.layer(self.conv_in, &input) };
        if let Some(block) = self.down_blocks.get(index) {
            return block.forward(input, &mut run);
        }
        if index == self.down_blocks.len() {
            return run_mid_block(&self.mid_resnets, self.mid_attention.as_ref(), &input, &mut run);
        }
        let moments = run.layer(self.conv_out, &silu_in_place(self.conv_norm_out.forward(&input)?)?)?;
        match self.quant_conv {
            Some(conv) => run.layer(conv, &moments),
            None => Ok(moments),
        }
    }
}

impl DownBlock {
    fn forward(&self, mut hidden: Tensor, run: &mut Run) -> Result<Tensor> {
        for resnet in &self.resnets {
            hidden = resnet.forward(&hidden, None, run)?;
        }
        match self.downsampler {
            // One row and column of zeros at the end, and none at the begin.
            Some(conv) => run.layer(conv, &hidden.f_constant_pad_nd([0, 1, 0, 1])?),
            None => Ok(hidden),
        }
    }
}
