//! The blocks before and after the stages.

use sdxl_model::ConvGeometry;
use sdxl_model::unet::{Sinusoids, UnetConfig};
use squeeze_base::error::Result;
use tch::{Device, Kind, Tensor};

use super::super::Network;
use super::UnetLowering;
use super::inputs::Inputs;
use crate::element::Element;
use crate::literal::Literal;
use crate::options::{Io, Layout, Options};
use crate::program::Var;

impl<'a> UnetLowering<'a> {
    /// Adds the embeddings and `conv_in`. Returns the output of `conv_in` too.
    pub(super) fn begin(
        mut network: Network<'a>,
        config: &UnetConfig,
        options: &Options,
        inputs: &Inputs,
    ) -> Result<(Self, Var)> {
        let net = &mut network;
        let first = *config.block_out_channels.first().expect("a UNet's config has at least one stage");
        let time = sinusoids(net, "time", inputs.get("timestep")?, &Sinusoids::new(config, first))?;
        let mut time = net.cast("time.fp16", &time, "fp16")?;
        if let Some(guidance) = inputs.find("timestep_cond") {
            let told = cond_proj(net, "time_embedding.cond_proj", guidance, first)?;
            time = net.binary("add", "time.guided", &time, &told)?;
        }
        let time = embedding(net, "time_embedding", time, config.time_embed_dim)?;

        let (batch, numbers) = (options.batch as u64, options.time_ids as u64);
        let width = config.addition_time_embed_dim;
        let flat = net.reshape("time_ids.flat", inputs.get("time_ids")?, &[batch * numbers])?;
        let ids = sinusoids(net, "time_ids", &flat, &Sinusoids::new(config, width))?;
        let ids = net.reshape("time_ids.rows", &ids, &[batch, numbers * width as u64])?;
        let ids = net.cast("time_ids.fp16", &ids, "fp16")?;
        let added = net.concat("added_conditions", &[inputs.get("text_embeds")?, &ids], -1)?;
        let added = embedding(net, "add_embedding", added, config.time_embed_dim)?;
        let temb = net.binary("add", "temb", &time, &added)?;
        let silu_temb = net.unary("silu", "temb.silu", &temb)?;

        let text = inputs.find("encoder_hidden_states").map(|text| text_states(net, options.io, text)).transpose()?;
        let mut sample = inputs.get("sample")?.clone();
        if config.center_input_sample {
            let half = |value| Literal::Half(half::f16::from_f32(value));
            sample = net.op("mul", "sample.doubled", [("x", (&sample).into()), ("y", half(2.0).into())])?;
            sample = net.op("sub", "sample.centered", [("x", (&sample).into()), ("y", half(1.0).into())])?;
        }
        let kernel = config.conv_in_kernel;
        let hidden = net.conv2d("conv_in", &sample, first, kernel, ConvGeometry::new(1, (kernel - 1) / 2), 0)?;
        let residuals = vec![hidden.clone()];
        Ok((UnetLowering { network, silu_temb: Some(silu_temb), text, residuals }, hidden))
    }

    /// GroupNorm, SiLU, `conv_out`, and a cast to fp32.
    pub(super) fn output_block(&mut self, config: &UnetConfig, hidden: &Var) -> Result<Var> {
        let net = &mut self.network;
        let normed = net.group_norm("conv_norm_out", hidden, config.norm_num_groups, config.norm_eps)?;
        let active = net.unary("silu", "conv_act", &normed)?;
        let kernel = config.conv_out_kernel;
        let out = net.conv2d("conv_out", &active, config.out_channels, kernel, ConvGeometry::new(1, (kernel - 1) / 2), 0)?;
        net.cast("noise_pred", &out, "fp32")
    }
}

/// Numbers [n] to their sinusoids [n, width], in fp32: in fp16 the angles would be off by up to a
/// quarter.
fn sinusoids(net: &mut Network, name: &str, x: &Var, sinusoids: &Sinusoids) -> Result<Var> {
    let x = match x.operand.array.element == Element::F32 {
        true => x.clone(),
        false => net.cast(&format!("{name}.fp32"), x, "fp32")?,
    };
    let column = net.expand(&format!("{name}.column"), &x, 1)?;
    let frequencies = sinusoids.frequencies(Device::Cpu)?;
    let frequencies = net.floats(&format!("{name}.frequencies"), &[1, (sinusoids.width / 2) as u64], &frequencies)?;
    let angles = net.binary("mul", &format!("{name}.angles"), &column, &frequencies)?;
    let cosines = net.unary("cos", &format!("{name}.cosines"), &angles)?;
    let sines = net.unary("sin", &format!("{name}.sines"), &angles)?;
    let mut parts = if sinusoids.cosines_first { vec![&cosines, &sines] } else { vec![&sines, &cosines] };
    let rest;
    if sinusoids.width % 2 == 1 {
        let [rows] = x.dims(name)?;
        let zeros = Tensor::f_zeros([rows as i64], (Kind::Float, Device::Cpu))?;
        rest = net.floats(&format!("{name}.rest"), &[rows, 1], &zeros)?;
        parts.push(&rest);
    }
    net.concat(&format!("{name}.sinusoids"), &parts, -1)
}

/// A Linear without bias from [b, g] to [b, width], in either layout.
fn cond_proj(net: &mut Network, name: &str, x: &Var, width: i64) -> Result<Var> {
    let [batch, _] = x.dims(name)?;
    match net.layout {
        Layout::Linear => net.dense(name, x, width, false),
        Layout::SplitEinsum => {
            let pixels = net.append_axes(&format!("{name}.input"), x)?;
            let told = net.dense(name, &pixels, width, false)?;
            net.reshape(&format!("{name}.rows"), &told, &[batch, width as u64])
        }
    }
}

/// Linear, SiLU, Linear on [b, c].
fn embedding(net: &mut Network, name: &str, x: Var, width: i64) -> Result<Var> {
    let x = match net.layout {
        Layout::Linear => x,
        Layout::SplitEinsum => net.append_axes(&format!("{name}.input"), &x)?,
    };
    let hidden = net.dense(&format!("{name}.linear_1"), &x, width, true)?;
    let active = net.unary("silu", &format!("{name}.act"), &hidden)?;
    net.dense(&format!("{name}.linear_2"), &active, width, true)
}

/// The text states, [b, n, c] or [b, c, 1, n], as tokens of the layout.
pub(super) fn text_states(net: &mut Network, io: Io, text: &Var) -> Result<Var> {
    match (net.layout, io) {
        (Layout::Linear, Io::Apple) => {
            let [batch, channels, _, tokens] = text.dims("text")?;
            let flat = net.reshape("text.flat", text, &[batch, channels, tokens])?;
            net.transpose("text.tokens", &flat, &[0, 2, 1])
        }
        (Layout::SplitEinsum, Io::Diffusers) => {
            let channels = net.transpose("text.channels", text, &[0, 2, 1])?;
            net.expand("text.row", &channels, 2)
        }
        (Layout::Linear, Io::Diffusers) | (Layout::SplitEinsum, Io::Apple) => Ok(text.clone()),
    }
}
