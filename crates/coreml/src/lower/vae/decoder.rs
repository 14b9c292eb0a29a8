//! The decoder: from latents to a picture.

use sdxl_model::ConvGeometry;
use sdxl_model::vae::{VaeConfig, VaeDecoder};
use squeeze_base::error::Result;
use squeeze_base::progress::{Progress, Task};

use super::{Lowered, Network, compute_element, mid_block, norm_out, resnet_shape};
use crate::element::ArrayType;
use crate::options::Layout;
use crate::program::ProgramBuilder;
use crate::weights::StoredTensors;

/// Lowers the decoder: latents `z` [1, c, h, w] that are not scaled any more, in the dtype of the
/// computation, to `image` [1, 3, h scale, w scale] in fp32 with values nominally in [-1, 1].
///
/// # Errors
/// If a weight cannot be read or written.
pub(crate) fn lower(
    config: &VaeConfig,
    weights: &dyn StoredTensors,
    latents: [i64; 2],
    program: ProgramBuilder,
    progress: &dyn Progress,
) -> Result<Lowered> {
    let tensors = VaeDecoder::tensors(config)?;
    let task = Task::begin(progress, "writing the package", "tensors", tensors.len());
    let mut network = Network::new(program, weights, Layout::Linear, task);
    network.element = compute_element(config);
    let net = &mut network;
    let [height, width] = latents.map(|n| n as u64);
    let channels = config.latent_channels;
    let given = net.input("z", ArrayType::new(net.element, [1, channels as u64, height, width]));
    let mut hidden = given.clone();
    if config.use_post_quant_conv {
        hidden = net.conv2d("post_quant_conv", &hidden, channels, 1, ConvGeometry::new(1, 0), 0)?;
    }
    let widths: Vec<i64> = config.block_out_channels.iter().rev().copied().collect();
    let same = ConvGeometry::new(1, 1);
    let mut before = widths[0];
    hidden = net.conv2d("decoder.conv_in", &hidden, before, 3, same, 0)?;
    hidden = mid_block(net, "decoder.mid_block", &hidden, config, before)?;
    for (i, width) in widths.iter().copied().enumerate() {
        let block = format!("decoder.up_blocks.{i}");
        for k in 0..=config.layers_per_block {
            let shape = resnet_shape(config, before, width);
            hidden = net.resnet(&format!("{block}.resnets.{k}"), &hidden, shape, None)?;
            before = width;
        }
        if i + 1 < widths.len() {
            let larger = net.upsample(&format!("{block}.upsamplers.0"), &hidden)?;
            hidden = net.conv2d(&format!("{block}.upsamplers.0.conv"), &larger, width, 3, same, 0)?;
        }
    }
    let active = norm_out(net, "decoder", &hidden, config)?;
    let image = net.conv2d_to("image", "decoder.conv_out", &active, config.out_channels, 3)?;
    let program = network.finish(&tensors)?;
    Ok(Lowered { program, inputs: vec![given], outputs: vec![image] })
}
