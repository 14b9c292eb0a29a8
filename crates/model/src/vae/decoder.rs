//! The decoder: from latents to a picture.

use std::ops::Range;

use squeeze_base::error::Result;
use squeeze_numerics::elementwise::silu_in_place;
use tch::Tensor;

use super::config::VaeConfig;
use crate::checkpoint::{Blueprint, TensorSource, TensorSpec};
use crate::layer::{ConvGeometry, Layer, Observer, Unobserved};
use crate::network::{Builder, GroupNorm, LayerId, Run, attend, split_heads};
use crate::pieces::{Pieces, States};
use crate::resnet::{Resnet, ResnetShape};

/// The decoding half of `diffusers.AutoencoderKL` (Rombach et al. 2022).
#[derive(Debug)]
pub struct VaeDecoder {
    config: VaeConfig,
    layers: Vec<Layer>,
    post_quant_conv: Option<LayerId>,
    conv_in: LayerId,
    mid_resnets: [Resnet; 2],
    mid_attention: Option<Attention>,
    up_blocks: Vec<UpBlock>,
    conv_norm_out: GroupNorm,
    conv_out: LayerId,
    /// The number of layers up to the end of each piece.
    ends: Vec<usize>,
}

#[derive(Debug)]
struct UpBlock {
    resnets: Vec<Resnet>,
    upsampler: Option<LayerId>,
}

pub(super) const EPS: f64 = 1e-6;

impl VaeDecoder {
    /// Builds the decoder, reading its weights from `source`.
    ///
    /// # Errors
    /// If a tensor is missing or misshapen.
    pub fn load(config: &VaeConfig, source: &dyn TensorSource) -> Result<Self> {
        let mut layers = Vec::new();
        let mut top = Builder::new(source, "", &mut layers);
        let latents = config.latent_channels;
        let groups = config.norm_num_groups;
        let shape = |input, output| ResnetShape { input, output, temb: None, groups, eps: EPS };
        let (point, same) = (ConvGeometry::new(1, 0), ConvGeometry::new(1, 1));
        let widths: Vec<i64> = config.block_out_channels.iter().rev().copied().collect();
        let (deepest, first) = (widths[0], widths[widths.len() - 1]);

        let post_quant_conv =
            config.use_post_quant_conv.then(|| top.conv2d("post_quant_conv", latents, latents, 1, point)).transpose()?;
        let mut decoder = top.at("decoder");
        let conv_in = decoder.conv2d("conv_in", latents, deepest, 3, same)?;
        let mut ends = vec![decoder.count()];
        let mut mid = decoder.at("mid_block");
        let mid_resnet_0 = Resnet::build(&mut mid.at("resnets").at(0), shape(deepest, deepest))?;
        let mid_attention = config
            .mid_block_add_attention
            .then(|| Attention::build(&mut mid.at("attentions").at(0), deepest, groups))
            .transpose()?;
        let mid_resnet_1 = Resnet::build(&mut mid.at("resnets").at(1), shape(deepest, deepest))?;
        drop(mid);
        ends.push(decoder.count());
        let mut up_blocks = Vec::new();
        for (i, width) in widths.iter().copied().enumerate() {
            let mut block = decoder.at(format_args!("up_blocks.{i}"));
            let before = widths[i.saturating_sub(1)];
            let resnets = (0..=config.layers_per_block)
                .map(|k| Resnet::build(&mut block.at("resnets").at(k), shape(if k == 0 { before } else { width }, width)))
                .collect::<Result<_>>()?;
            let upsampler =
                (i + 1 < widths.len()).then(|| block.at("upsamplers").at(0).conv2d("conv", width, width, 3, same)).transpose()?;
            up_blocks.push(UpBlock { resnets, upsampler });
            ends.push(block.count());
        }
        let conv_norm_out = decoder.group_norm("conv_norm_out", groups, first, EPS)?;
        let conv_out = decoder.conv2d("conv_out", first, config.out_channels, 3, same)?;
        ends.push(decoder.count());
        Ok(VaeDecoder {
            config: config.clone(),
            layers,
            post_quant_conv,
            conv_in,
            mid_resnets: [mid_resnet_0, mid_resnet_1],
            mid_attention,
            up_blocks,
            conv_norm_out,
            conv_out,
            ends,
        })
    }

    /// Every tensor of the decoder.
    ///
    /// # Errors
    /// If libtorch cannot make a tensor at all.
    pub fn tensors(config: &VaeConfig) -> Result<Vec<TensorSpec>> {
        let blueprint = Blueprint::default();
        Self::load(config, &blueprint)?;
        Ok(blueprint.into_tensors())
    }

    /// The current name of a stored tensor. The parts of the attention have other names in older
    /// files, which diffusers renames too.
    #[must_use]
    pub fn rename(stored: &str) -> String {
        let Some((path, leaf)) = stored.rsplit_once('.') else { return stored.to_owned() };
        let Some((path, part)) = path.rsplit_once('.') else { return stored.to_owned() };
        let part = match part {
            "query" => "to_q",
            "key" => "to_k",
            "value" => "to_v",
            "proj_attn" => "to_out.0",
            other => other,
        };
        format!("{path}.{part}.{leaf}")
    }

    /// Whether a tensor is a matrix of the mid block's attention. Older converters store these
    /// matrices as 1x1 convolutions.
    #[must_use]
    pub fn is_linear(name: &str) -> bool {
        name.contains(".attentions.")
            && ["to_q", "to_k", "to_v", "to_out.0"].iter().any(|part| name.ends_with(&format!(".{part}.weight")))
    }

    /// Whether a tensor belongs to the encoder, which the decoder does not need.
    #[must_use]
    pub fn is_unused(name: &str) -> bool {
        name.starts_with("encoder.") || name.starts_with("quant_conv.")
    }

    /// The architecture.
    #[must_use]
    pub fn config(&self) -> &VaeConfig {
        &self.config
    }

    /// Reverts the scaling of latents [b, c, h, w] under diffusion, as the decoder expects.
    ///
    /// # Errors
    /// If libtorch refuses an operation.
    pub fn unscale(&self, latents: &Tensor) -> Result<Tensor> {
        let factor = self.config.scaling_factor;
        Ok(match &self.config.latents_mean_std {
            None => latents.f_div_scalar(factor)?,
            Some((mean, std)) => {
                let across = |values: &[f64]| {
                    Tensor::f_from_slice(values)?
                        .f_view([1, -1, 1, 1])?
                        .f_to_device(latents.device())?
                        .f_to_kind(latents.f_kind()?)
                };
                latents.f_mul(&across(std)?)?.f_div_scalar(factor)?.f_add(&across(mean)?)?
            }
        })
    }

    /// Decodes unscaled latents [b, c, h, w] to a picture [b, 3, h scale, w scale] with values
    /// nominally in [-1, 1].
    ///
    /// # Errors
    /// If libtorch refuses an operation.
    pub fn forward(&self, latents: &Tensor) -> Result<Tensor> {
        let pieces = 0..self.ends.len();
        let first = latents.shallow_clone();
        pieces.into_iter().try_fold(first, |hidden, piece| self.run_piece(piece, States { hidden, ids: None }, &mut Unobserved))
    }
}

/// The mid block of either half: a resnet, attention where the config has it, a resnet.
pub(super) fn run_mid_block(
    resnets: &[Resnet; 2],
    attention: Option<&Attention>,
    input: &Tensor,
    run: &mut Run,
) -> Result<Tensor> {
    let mut hidden = resnets[0].forward(input, None, run)?;
    if let Some(attention) = attention {
        hidden = attention.forward(&hidden, run)?;
    }
    resnets[1].forward(&hidden, None, run)
}

/// The pieces are the input convolutions, the mid block, each up block, and the last convolution.
impl Pieces for VaeDecoder {
    fn layers(&self) -> &[Layer] {
        &self.layers
    }

    fn layers_mut(&mut self) -> &mut [Layer] {
        &mut self.layers
    }

    fn pieces(&self) -> Vec<(String, Range<usize>)> {
        let ups = (0..self.up_blocks.len()).map(|index| format!("decoder.up_blocks.{index}"));
        let names = ["decoder.conv_in".to_owned(), "decoder.mid_block".to_owned()].into_iter().chain(ups);
        let names = names.chain(["decoder.conv_out".to_owned()]);
        let begins = std::iter::once(0).chain(self.ends.iter().copied());
        names.zip(begins.zip(&self.ends).map(|(begin, end)| begin..*end)).collect()
    }

    fn run_piece(&self, index: usize, states: States, observer: &mut dyn Observer) -> Result<Tensor> {
        let mut run = Run::new(&self.layers, observer);
        let input = states.hidden;
        match index {
            0 => {
                let quantized = self.post_quant_conv.map(|conv| run.layer(conv, &input)).transpose()?;
                run.layer(self.conv_in, quantized.as_ref().unwrap_or(&input))
            }
            1 => run_mid_block(&self.mid_resnets, self.mid_attention.as_ref(), &input, &mut run),
            index => match self.up_blocks.get(index - 2) {
                Some(block) => block.forward(input, &mut run),
                None => run.layer(self.conv_out, &silu_in_place(self.conv_norm_out.forward(&input)?)?),
            },
        }
    }
}

impl UpBlock {
    fn forward(&self, mut hidden: Tensor, run: &mut Run) -> Result<Tensor> {
        for resnet in &self.resnets {
            hidden = resnet.forward(&hidden, None, run)?;
        }
        let Some(conv) = self.upsampler else { return Ok(hidden) };
        let (_, _, height, width) = hidden.size4()?;
        run.layer(conv, &hidden.f_upsample_nearest2d([2 * height, 2 * width], None, None)?)
    }
}

/// The mid block's self-attention: one head over all positions, with a skip connection.
#[derive(Debug)]
pub(super) struct Attention {
    group_norm: GroupNorm,
    to_q: LayerId,
    to_k: LayerId,
    to_v: LayerId,
    to_out: LayerId,
}

impl Attention {
    pub(super) fn build(b: &mut Builder, channels: i64, groups: i64) -> Result<Self> {
        Ok(Attention {
            group_norm: b.group_norm("group_norm", groups, channels, EPS)?,
            to_q: b.linear("to_q", channels, channels, true)?,
            to_k: b.linear("to_k", channels, channels, true)?,
            to_v: b.linear("to_v", channels, channels, true)?,
            to_out: b.linear("to_out.0", channels, channels, true)?,
        })
    }

    pub(super) fn forward(&self, input: &Tensor, run: &mut Run) -> Result<Tensor> {
        let shape = input.size();
        let tokens = self.group_norm.forward(input)?.f_flatten(2, 3)?.f_transpose(1, 2)?;
        let query = split_heads(&run.layer(self.to_q, &tokens)?, 1)?;
        let key = split_heads(&run.layer(self.to_k, &tokens)?, 1)?;
        let value = split_heads(&run.layer(self.to_v, &tokens)?, 1)?;
        run.onto(self.to_out, input)?;
        let mixed = run.layer(self.to_out, &attend(&query, &key, &value, false)?)?;
        Ok(mixed.f_transpose(1, 2)?.f_reshape(shape)?.f_add(input)?)
    }
}
