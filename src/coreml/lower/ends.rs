//! What comes before and after the stages.

use tch::{Device, Kind, Tensor};

use super::{Io, Layout, Lowering, Options};
use crate::coreml::element::{ArrayType, Element};
use crate::coreml::literal::Literal;
use crate::coreml::program::Var;
use crate::error::{Error, Result};
use crate::model::ConvGeometry;
use crate::model::unet::{Sinusoids, UnetConfig};

impl Lowering<'_> {
    /// `sample`, `timestep`, `encoder_hidden_states`, `time_ids` and `text_embeds`, in the order of Apple's UNet.
    pub(super) fn inputs(&mut self, config: &UnetConfig, options: &Options, pooled: i64) -> Vec<Var> {
        let batch = self.batch;
        let [height, width] = options.latents.map(|n| n as u64);
        let (tokens, channels) = (options.tokens as u64, config.cross_attention_dim as u64);
        // fp16 holds integers up to 2,048 only, and no other timesteps.
        let (exact, text) = match options.io {
            Io::Diffusers => (Element::F32, vec![batch, tokens, channels]),
            Io::Apple => (Element::F16, vec![batch, channels, 1, tokens]),
        };
        let inputs = [
            ("sample", Element::F16, vec![batch, config.in_channels as u64, height, width]),
            ("timestep", exact, vec![batch]),
            ("encoder_hidden_states", Element::F16, text),
            ("time_ids", exact, vec![batch, options.time_ids as u64]),
            ("text_embeds", Element::F16, vec![batch, pooled as u64]),
        ];
        inputs.into_iter().map(|(name, element, shape)| self.input(name, ArrayType { element, shape })).collect()
    }

    /// The embeddings and conv_in.
    pub(super) fn head(&mut self, config: &UnetConfig, inputs: &[Var]) -> Result<Var> {
        let [sample, timestep, text, time_ids, text_embeds] = inputs else {
            return Err(Error::Failed("a UNet has five inputs".into()));
        };
        let first = config.block_out_channels.first().copied().unwrap_or_default();
        let time = self.sinusoids("time", timestep, &Sinusoids::new(config, first))?;
        let time = self.cast("time.fp16", &time, "fp16")?;
        let time = self.embedding("time_embedding", time, config.time_embed_dim)?;

        let [batch, numbers] = *time_ids.shape() else { return Err(Error::Failed("time_ids of another rank".into())) };
        let width = config.addition_time_embed_dim;
        let flat = self.reshape("time_ids.flat", time_ids, &[batch * numbers])?;
        let ids = self.sinusoids("time_ids", &flat, &Sinusoids::new(config, width))?;
        let ids = self.reshape("time_ids.rows", &ids, &[batch, numbers * width as u64])?;
        let ids = self.cast("time_ids.fp16", &ids, "fp16")?;
        let added = self.concat("added_conditions", &[text_embeds, &ids], -1)?;
        let added = self.embedding("add_embedding", added, config.time_embed_dim)?;
        let temb = self.binary("add", "temb", &time, &added)?;
        self.silu_temb = Some(self.unary("silu", "temb.silu", &temb)?);

        self.text = Some(self.text_states(text)?);
        let mut sample = sample.clone();
        if config.center_input_sample {
            let half = |value| Literal::Half(half::f16::from_f32(value));
            sample = self.op("mul", "sample.doubled", [("x", (&sample).into()), ("y", half(2.0).into())])?;
            sample = self.op("sub", "sample.centered", [("x", (&sample).into()), ("y", half(1.0).into())])?;
        }
        let kernel = config.conv_in_kernel;
        let hidden = self.conv2d("conv_in", &sample, first, kernel, ConvGeometry::new(1, (kernel - 1) / 2), 0)?;
        self.residuals.push(hidden.clone());
        Ok(hidden)
    }

    /// GroupNorm, SiLU, conv_out, and fp32 for whoever reads it.
    pub(super) fn tail(&mut self, config: &UnetConfig, hidden: &Var) -> Result<Var> {
        let normed = self.group_norm("conv_norm_out", hidden, config.norm_num_groups, config.norm_eps)?;
        let active = self.unary("silu", "conv_act", &normed)?;
        let kernel = config.conv_out_kernel;
        let out = self.conv2d("conv_out", &active, config.out_channels, kernel, ConvGeometry::new(1, (kernel - 1) / 2), 0)?;
        self.cast("noise_pred", &out, "fp32")
    }

    /// Numbers [n] to their sinusoids [n, width], in fp32: in fp16 the angles would be off by up to a quarter.
    fn sinusoids(&mut self, name: &str, x: &Var, sinusoids: &Sinusoids) -> Result<Var> {
        let x = match x.operand.array.element {
            Element::F32 => x.clone(),
            _ => self.cast(&format!("{name}.fp32"), x, "fp32")?,
        };
        let column = self.expand(&format!("{name}.column"), &x, 1)?;
        let frequencies = sinusoids.frequencies(Device::Cpu)?;
        let frequencies = self.floats(&format!("{name}.frequencies"), &[1, (sinusoids.width / 2) as u64], &frequencies)?;
        let angles = self.binary("mul", &format!("{name}.angles"), &column, &frequencies)?;
        let cosines = self.unary("cos", &format!("{name}.cosines"), &angles)?;
        let sines = self.unary("sin", &format!("{name}.sines"), &angles)?;
        let mut parts = if sinusoids.cosines_first { vec![&cosines, &sines] } else { vec![&sines, &cosines] };
        let rest;
        if sinusoids.width % 2 == 1 {
            let rows = x.shape().first().copied().unwrap_or_default();
            let zeros = Tensor::f_zeros([rows as i64], (Kind::Float, Device::Cpu))?;
            rest = self.floats(&format!("{name}.rest"), &[rows, 1], &zeros)?;
            parts.push(&rest);
        }
        self.concat(&format!("{name}.sinusoids"), &parts, -1)
    }

    /// Linear, SiLU, Linear on [b, c].
    fn embedding(&mut self, name: &str, x: Var, width: i64) -> Result<Var> {
        let x = match self.layout {
            Layout::Linear => x,
            Layout::SplitEinsum => self.append_axes(&format!("{name}.input"), &x)?,
        };
        let hidden = self.dense(&format!("{name}.linear_1"), &x, width, true)?;
        let active = self.unary("silu", &format!("{name}.act"), &hidden)?;
        self.dense(&format!("{name}.linear_2"), &active, width, true)
    }

    /// The text states, [b, tokens, channels] or [b, channels, 1, tokens], as the layout has tokens.
    fn text_states(&mut self, text: &Var) -> Result<Var> {
        match (self.layout, self.io, text.shape()) {
            (Layout::Linear, Io::Apple, &[batch, channels, 1, tokens]) => {
                let flat = self.reshape("text.flat", text, &[batch, channels, tokens])?;
                self.transpose("text.tokens", &flat, &[0, 2, 1])
            }
            (Layout::SplitEinsum, Io::Diffusers, _) => {
                let channels = self.transpose("text.channels", text, &[0, 2, 1])?;
                self.expand("text.row", &channels, 2)
            }
            _ => Ok(text.clone()),
        }
    }
}
