//! The encoder's tensors. Nothing here encodes; `synth` writes them, so that diffusers loads its
//! folders without complaint.

use squeeze_base::error::Result;

use super::config::VaeConfig;
use super::decoder::{Attention, EPS};
use crate::checkpoint::{Blueprint, TensorSpec};
use crate::layer::ConvGeometry;
use crate::network::Builder;
use crate::resnet::{Resnet, ResnetShape};

/// Every tensor of the encoding half of `diffusers.AutoencoderKL`, for pictures of three channels.
///
/// # Errors
/// If libtorch cannot make a tensor at all.
pub fn encoder_tensors(config: &VaeConfig) -> Result<Vec<TensorSpec>> {
    let blueprint = Blueprint::default();
    let mut layers = Vec::new();
    let mut top = Builder::new(&blueprint, "", &mut layers);
    let groups = config.norm_num_groups;
    let shape = |input, output| ResnetShape { input, output, temb: None, groups, eps: EPS };
    let same = ConvGeometry::new(1, 1);
    let widths = &config.block_out_channels;
    let deepest = widths[widths.len() - 1];
    let moments = 2 * config.latent_channels;

    let mut encoder = top.at("encoder");
    encoder.conv2d("conv_in", config.out_channels, widths[0], 3, same)?;
    for (i, width) in widths.iter().copied().enumerate() {
        let mut block = encoder.at(format_args!("down_blocks.{i}"));
        for k in 0..config.layers_per_block {
            let input = if k == 0 { widths[i.saturating_sub(1)] } else { width };
            Resnet::build(&mut block.at("resnets").at(k), shape(input, width))?;
        }
        if i + 1 < widths.len() {
            block.at("downsamplers.0").conv2d("conv", width, width, 3, ConvGeometry::new(2, 0))?;
        }
    }
    let mut mid = encoder.at("mid_block");
    Resnet::build(&mut mid.at("resnets.0"), shape(deepest, deepest))?;
    if config.mid_block_add_attention {
        Attention::build(&mut mid.at("attentions.0"), deepest, groups)?;
    }
    Resnet::build(&mut mid.at("resnets.1"), shape(deepest, deepest))?;
    encoder.group_norm("conv_norm_out", groups, deepest, EPS)?;
    encoder.conv2d("conv_out", deepest, moments, 3, same)?;
    top.conv2d("quant_conv", moments, moments, 1, ConvGeometry::new(1, 0))?;
    Ok(blueprint.into_tensors())
}
