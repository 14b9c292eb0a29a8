//! The VAE's halves as programs: the computation of [`sdxl_model::vae`], with inputs and outputs as
//! Apple's Swift pipeline has them (apple/ml-stable-diffusion, `Decoder.swift`, `Encoder.swift`).

mod decoder;
mod encoder;

pub(crate) use decoder::lower as lower_decoder;
pub(crate) use encoder::lower as lower_encoder;
use sdxl_model::ResnetShape;
use sdxl_model::vae::VaeConfig;
use squeeze_base::error::Result;

use super::attention::Heads;
use super::{Lowered, Network};
use crate::element::Element;
use crate::program::Var;

/// Epsilon of the VAE's norms.
const EPS: f64 = 1e-6;

/// The dtype that a VAE is computed in: SDXL's own overflows in fp16, and says so.
pub(crate) fn compute_element(config: &VaeConfig) -> Element {
    if config.force_upcast { Element::F32 } else { Element::F16 }
}

/// The shape of a VAE's resnet.
fn resnet_shape(config: &VaeConfig, input: i64, output: i64) -> ResnetShape {
    ResnetShape { input, output, temb: None, groups: config.norm_num_groups, eps: EPS }
}

/// `UNetMidBlock2D`: two resnets around self-attention.
fn mid_block(net: &mut Network, name: &str, x: &Var, config: &VaeConfig, channels: i64) -> Result<Var> {
    let shape = resnet_shape(config, channels, channels);
    let mut hidden = net.resnet(&format!("{name}.resnets.0"), x, shape, None)?;
    if config.mid_block_add_attention {
        hidden = attention(net, &format!("{name}.attentions.0"), &hidden, config.norm_num_groups)?;
    }
    net.resnet(&format!("{name}.resnets.1"), &hidden, shape, None)
}

/// Self-attention of one head over all positions, with a skip connection.
fn attention(net: &mut Network, name: &str, x: &Var, groups: i64) -> Result<Var> {
    let pixels = x.dims(name)?;
    let [_, channels, _, _] = pixels;
    let normed = net.group_norm(&format!("{name}.group_norm"), x, groups, EPS)?;
    let tokens = net.tokens(name, &normed)?;
    let mut project = |part: &str| net.dense(&format!("{name}.{part}"), &tokens, channels as i64, true);
    let (query, key, value) = (project("to_q")?, project("to_k")?, project("to_v")?);
    let mixed = net.whole_attention(name, [&query, &key, &value], Heads { heads: 1, width: channels }, None)?;
    let mixed = net.dense(&format!("{name}.to_out.0"), &mixed, channels as i64, true)?;
    let image = net.image(name, &mixed, pixels)?;
    net.binary("add", name, &image, x)
}

/// The norm and the activation before a half's last convolution.
fn norm_out(net: &mut Network, half: &str, x: &Var, config: &VaeConfig) -> Result<Var> {
    let normed = net.group_norm(&format!("{half}.conv_norm_out"), x, config.norm_num_groups, EPS)?;
    net.unary("silu", &format!("{half}.conv_act"), &normed)
}
