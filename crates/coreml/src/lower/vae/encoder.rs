//! The encoder: from a picture to the moments of its latents.

use sdxl_model::ConvGeometry;
use sdxl_model::vae::{VaeConfig, VaeEncoder};
use squeeze_base::error::Result;
use squeeze_base::progress::{Progress, Task};

use super::{Lowered, Network, compute_element, mid_block, norm_out, resnet_shape};
use crate::element::{ArrayType, Element};
use crate::options::Layout;
use crate::program::ProgramBuilder;
use crate::weights::StoredTensors;

/// Lowers the encoder: a picture `x` [1, 3, h scale, w scale] in fp32 with values in [-1, 1] to
/// `latent` [1, 2c, h, w] in fp32: means, then logarithms of variances, neither scaled nor clamped.
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
    let tensors = VaeEncoder::tensors(config)?;
    let task = Task::begin(progress, "writing the package", "tensors", tensors.len());
    let mut network = Network::new(program, weights, Layout::Linear, task);
    network.element = compute_element(config);
    let net = &mut network;
    let [height, width] = latents.map(|n| (n * config.scale()) as u64);
    let given = net.input("x", ArrayType::new(Element::F32, [1, config.out_channels as u64, height, width]));
    let mut hidden = match net.element {
        Element::F32 => given.clone(),
        _ => net.cast("x.fp16", &given, "fp16")?,
    };
    let widths = &config.block_out_channels;
    let mut before = widths[0];
    hidden = net.conv2d("encoder.conv_in", &hidden, before, 3, ConvGeometry::new(1, 1), 0)?;
    for (i, width) in widths.iter().copied().enumerate() {
        let block = format!("encoder.down_blocks.{i}");
        for k in 0..config.layers_per_block {
            let shape = resnet_shape(config, before, width);
            hidden = net.resnet(&format!("{block}.resnets.{k}"), &hidden, shape, None)?;
            before = width;
        }
        if i + 1 < widths.len() {
            // One row and column of zeros at the end, and none at the begin.
            let geometry = ConvGeometry::new(2, 0);
            hidden = net.conv2d(&format!("{block}.downsamplers.0.conv"), &hidden, width, 3, geometry, 1)?;
        }
    }
    hidden = mid_block(net, "encoder.mid_block", &hidden, config, before)?;
    let active = norm_out(net, "encoder", &hidden, config)?;
    let moments = 2 * config.latent_channels;
    let latent = if config.use_quant_conv {
        let made = net.conv2d("encoder.conv_out", &active, moments, 3, ConvGeometry::new(1, 1), 0)?;
        net.conv2d_to("latent", "quant_conv", &made, moments, 1)?
    } else {
        net.conv2d_to("latent", "encoder.conv_out", &active, moments, 3)?
    };
    let program = network.finish(&tensors)?;
    Ok(Lowered { program, inputs: vec![given], outputs: vec![latent] })
}
