//! The input block (embeddings and conv_in) and the output block (norm and conv_out) of the UNet.

use squeeze_base::error::{Error, Result};
use squeeze_numerics::elementwise::{silu, silu_in_place};
use tch::{Device, Kind, Tensor};

use super::carry::Carry;
use super::config::UnetConfig;
use crate::checkpoint::TensorSource;
use crate::layer::{ConvGeometry, Layer, Observer};
use crate::network::{Builder, GroupNorm, LayerId, Run};

/// The inputs of a UNet besides noisy latents and timestep.
#[derive(Debug)]
pub struct Conditioning {
    /// Text states: [b, s, cross_attention_dim].
    pub encoder_hidden_states: Tensor,
    /// Pooled text: [b, p].
    pub text_embeds: Tensor,
    /// Sizes and crop (base: 6 numbers) or sizes, crop and aesthetic score (refiner: 5): [b, n].
    pub time_ids: Tensor,
    /// The guidance scale's sinusoids, for a UNet with `time_cond_proj_dim`: [b,
    /// time_cond_proj_dim].
    pub timestep_cond: Option<Tensor>,
}

impl Conditioning {
    /// The same tensors (no data is copied).
    #[must_use]
    pub fn shallow_clone(&self) -> Self {
        Conditioning {
            encoder_hidden_states: self.encoder_hidden_states.shallow_clone(),
            text_embeds: self.text_embeds.shallow_clone(),
            time_ids: self.time_ids.shallow_clone(),
            timestep_cond: self.timestep_cond.as_ref().map(Tensor::shallow_clone),
        }
    }

    /// Concatenates the conditioning of several calls along the batch; `None` if their shapes
    /// differ.
    ///
    /// # Errors
    /// If libtorch refuses, usually for want of memory.
    pub fn join(all: &[&Conditioning]) -> Result<Option<Conditioning>> {
        let [first, others @ ..] = all else { return Ok(None) };
        let shape = |one: &Conditioning| {
            let of_guidance = one.timestep_cond.as_ref().map(Tensor::size);
            (one.encoder_hidden_states.size(), one.text_embeds.size(), one.time_ids.size(), of_guidance)
        };
        if others.iter().any(|other| shape(other) != shape(first)) {
            return Ok(None);
        }
        let join = |pick: &dyn Fn(&Conditioning) -> &Tensor| -> Result<Tensor> {
            Ok(Tensor::f_cat(&all.iter().map(|one| pick(one)).collect::<Vec<_>>(), 0)?)
        };
        let guidance: Vec<&Tensor> = all.iter().filter_map(|one| one.timestep_cond.as_ref()).collect();
        Ok(Some(Conditioning {
            encoder_hidden_states: join(&|one| &one.encoder_hidden_states)?,
            text_embeds: join(&|one| &one.text_embeds)?,
            time_ids: join(&|one| &one.time_ids)?,
            timestep_cond: if guidance.is_empty() { None } else { Some(Tensor::f_cat(&guidance, 0)?) },
        }))
    }
}

/// The part of the input on which a layer of the [`InputBlock`] depends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InputBlockDependency {
    /// The timestep alone.
    Time,
    /// Pooled text and time ids, or the guidance scale.
    Conditioning,
    /// The noisy latents.
    Latents,
}

/// conv_in and the embeddings of timestep, pooled text and time ids: makes the first carry.
#[derive(Debug)]
pub struct InputBlock {
    layers: Vec<Layer>,
    time_embedding: Embedding,
    add_embedding: Embedding,
    conv_in: LayerId,
    time: Sinusoids,
    time_ids: Sinusoids,
    center_input_sample: bool,
}

impl InputBlock {
    pub(super) fn load(config: &UnetConfig, source: &dyn TensorSource) -> Result<Self> {
        let mut layers = Vec::new();
        let mut top = Builder::new(source, "", &mut layers);
        let first = config.block_out_channels[0];
        let width = config.time_embed_dim;
        let kernel = config.conv_in_kernel;
        Ok(InputBlock {
            time_embedding: Embedding::build(&mut top.at("time_embedding"), first, width, config.time_cond_proj_dim)?,
            add_embedding: {
                let input = config.projection_class_embeddings_input_dim;
                Embedding::build(&mut top.at("add_embedding"), input, width, None)?
            },
            conv_in: top.conv2d("conv_in", config.in_channels, first, kernel, ConvGeometry::new(1, (kernel - 1) / 2))?,
            time: Sinusoids::new(config, first),
            time_ids: Sinusoids::new(config, config.addition_time_embed_dim),
            center_input_sample: config.center_input_sample,
            layers,
        })
    }

    /// The layers, in execution order.
    #[must_use]
    pub fn layers(&self) -> &[Layer] {
        &self.layers
    }

    /// The layers, for replacing weights.
    pub fn layers_mut(&mut self) -> &mut [Layer] {
        &mut self.layers
    }

    /// The part of the input on which the layer `name` depends.
    #[must_use]
    pub fn dependency_of(&self, name: &str) -> InputBlockDependency {
        let of = |id: LayerId| id.of(&self.layers).name() == name;
        if of(self.conv_in) {
            InputBlockDependency::Latents
        } else if of(self.time_embedding.linear_1) || of(self.time_embedding.linear_2) {
            InputBlockDependency::Time
        } else {
            InputBlockDependency::Conditioning
        }
    }

    /// The embedding of timesteps `times` `[n]`, to which that of the conditioning is not yet
    /// added: [n, time_embed_dim] in `kind`. `timestep_cond` is [`Conditioning::timestep_cond`], of
    /// one row or n.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn embed_times(
        &self,
        times: &Tensor,
        timestep_cond: Option<&Tensor>,
        kind: Kind,
        observer: &mut dyn Observer,
    ) -> Result<Tensor> {
        let (times, mut run) = (self.time.of(times)?.f_to_kind(kind)?, Run::new(&self.layers, observer));
        let times = match (self.time_embedding.cond_proj, timestep_cond) {
            (None, None) => times,
            (Some(cond_proj), Some(guidance)) => times.f_add(&run.layer(cond_proj, &guidance.f_to_kind(kind)?)?)?,
            (Some(_), None) => return Err(Error::Argument("the UNet takes an embedded guidance scale; none is given".into())),
            (None, Some(_)) => return Err(Error::Argument("the UNet takes no embedded guidance scale; one is given".into())),
        };
        self.time_embedding.forward(&times, &mut run)
    }

    /// The embedding of timesteps `times` `[b]` and of the conditioning: [b, time_embed_dim] in
    /// `kind`.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn embed(&self, times: &Tensor, conditioning: &Conditioning, kind: Kind, observer: &mut dyn Observer) -> Result<Tensor> {
        let temb = self.embed_times(times, conditioning.timestep_cond.as_ref(), kind, observer)?;
        let mut run = Run::new(&self.layers, observer);
        let ids = self.time_ids.of(&conditioning.time_ids.f_flatten(0, -1)?)?.f_reshape([times.size1()?, -1])?;
        let text_embeds = conditioning.text_embeds.f_to_kind(ids.f_kind()?)?;
        let added = Tensor::f_cat(&[text_embeds, ids], -1)?.f_to_kind(kind)?;
        Ok(temb.f_add(&self.add_embedding.forward(&added, &mut run)?)?)
    }

    /// Embeds noisy latents `sample` [b, c, h, w] at `timestep` (in training steps, 0 to 999).
    ///
    /// # Errors
    /// If libtorch refuses an operation (usually a shape), or the observer ends the run.
    pub fn forward(
        &self,
        sample: &Tensor,
        timestep: f64,
        conditioning: &Conditioning,
        observer: &mut dyn Observer,
    ) -> Result<Carry> {
        let kind = sample.f_kind()?;
        let batch = sample.size4()?.0;
        let time = Tensor::f_full([batch], timestep, (Kind::Float, sample.device()))?;
        let temb = self.embed(&time, conditioning, kind, observer)?;

        let mut run = Run::new(&self.layers, observer);
        let centered = if self.center_input_sample { Some(sample.f_mul_scalar(2.0)?.f_sub_scalar(1.0)?) } else { None };
        let hidden_states = run.layer(self.conv_in, centered.as_ref().unwrap_or(sample))?;
        Ok(Carry {
            down_block_res_samples: vec![hidden_states.shallow_clone()],
            hidden_states,
            tokens: None,
            temb,
            encoder_hidden_states: conditioning.encoder_hidden_states.shallow_clone(),
        })
    }
}

/// `diffusers.models.embeddings.TimestepEmbedding`: Linear, SiLU, Linear.
#[derive(Debug)]
struct Embedding {
    /// Projects the embedded guidance scale, which is added to the input.
    cond_proj: Option<LayerId>,
    linear_1: LayerId,
    linear_2: LayerId,
}

impl Embedding {
    fn build(b: &mut Builder, input: i64, width: i64, cond_proj_dim: Option<i64>) -> Result<Self> {
        Ok(Embedding {
            cond_proj: cond_proj_dim.map(|dim| b.linear("cond_proj", dim, input, false)).transpose()?,
            linear_1: b.linear("linear_1", input, width, true)?,
            linear_2: b.linear("linear_2", width, width, true)?,
        })
    }

    fn forward(&self, input: &Tensor, run: &mut Run) -> Result<Tensor> {
        // Not in place: an observer may have made the output a leaf of a graph.
        let hidden = silu(&run.layer(self.linear_1, input)?)?;
        run.layer(self.linear_2, &hidden)
    }
}

/// The sinusoidal embedding of a number (Vaswani et al. 2017;
/// `diffusers.models.embeddings.get_timestep_embedding`), in fp32.
#[derive(Debug)]
pub struct Sinusoids {
    /// Numbers of an embedding.
    pub width: i64,
    /// Whether the cosines come before the sines (diffusers' `flip_sin_to_cos`).
    pub cosines_first: bool,
    shift: f64,
}

impl Sinusoids {
    /// The sinusoids of a UNet, `width` of them for each number.
    #[must_use]
    pub fn new(config: &UnetConfig, width: i64) -> Self {
        Sinusoids { width, cosines_first: config.flip_sin_to_cos, shift: config.freq_shift }
    }

    /// The frequencies by which a number is multiplied: [width / 2], fp32.
    pub fn frequencies(&self, device: Device) -> Result<Tensor> {
        const MAX_PERIOD: f64 = 10_000.0;
        let half = self.width / 2;
        let exponent = Tensor::f_arange(half, (Kind::Float, device))?;
        Ok(exponent.f_mul_scalar(-MAX_PERIOD.ln())?.f_div_scalar(half as f64 - self.shift)?.f_exp()?)
    }

    /// The sinusoids of numbers `[n]`: [n, width].
    fn of(&self, values: &Tensor) -> Result<Tensor> {
        let frequencies = self.frequencies(values.device())?.f_unsqueeze(0)?;
        let angles = values.f_to_kind(Kind::Float)?.f_unsqueeze(1)?.f_mul(&frequencies)?;
        let (sines, cosines) = (angles.f_sin()?, angles.f_cos()?);
        let mut parts = if self.cosines_first { vec![cosines, sines] } else { vec![sines, cosines] };
        if self.width % 2 == 1 {
            parts.push(Tensor::f_zeros([values.size1()?, 1], (Kind::Float, values.device()))?);
        }
        Ok(Tensor::f_cat(&parts, -1)?)
    }
}

/// The guidance scale's sinusoids, for [`Conditioning::timestep_cond`]: [1, width] in fp32, of
/// 1,000 (scale - 1) (`get_guidance_scale_embedding` in diffusers).
///
/// # Errors
/// If libtorch refuses an operation.
pub fn guidance_scale_embedding(scale: f64, width: i64) -> Result<Tensor> {
    let half = width / 2;
    // The angles are in the thousands, so that every rounding must be that of diffusers. It
    // subtracts in fp64, and multiplies in fp32.
    let scale = Tensor::f_from_slice(&[(scale - 1.0) as f32])?.f_mul_scalar(1000.0)?;
    let step = Tensor::f_from_slice(&[10_000_f32])?.f_log()?.f_div_scalar((half - 1) as f64)?;
    let frequencies = Tensor::f_arange(half, (Kind::Float, Device::Cpu))?.f_mul(&step.f_neg()?)?.f_exp()?;
    let angles = scale.f_unsqueeze(1)?.f_mul(&frequencies.f_unsqueeze(0)?)?;
    let mut parts = vec![angles.f_sin()?, angles.f_cos()?];
    if width % 2 == 1 {
        parts.push(Tensor::f_zeros([1, 1], (Kind::Float, Device::Cpu))?);
    }
    Ok(Tensor::f_cat(&parts, -1)?)
}

/// GroupNorm, SiLU and conv_out: turns the last carry into the prediction.
#[derive(Debug)]
pub struct OutputBlock {
    layers: Vec<Layer>,
    conv_norm_out: GroupNorm,
    conv_out: LayerId,
}

impl OutputBlock {
    pub(super) fn load(config: &UnetConfig, source: &dyn TensorSource) -> Result<Self> {
        let mut layers = Vec::new();
        let mut top = Builder::new(source, "", &mut layers);
        let first = config.block_out_channels[0];
        let kernel = config.conv_out_kernel;
        Ok(OutputBlock {
            conv_norm_out: top.group_norm("conv_norm_out", config.norm_num_groups, first, config.norm_eps)?,
            conv_out: top.conv2d("conv_out", first, config.out_channels, kernel, ConvGeometry::new(1, (kernel - 1) / 2))?,
            layers,
        })
    }

    /// The layers, in execution order.
    #[must_use]
    pub fn layers(&self) -> &[Layer] {
        &self.layers
    }

    /// The layers, for replacing weights.
    pub fn layers_mut(&mut self) -> &mut [Layer] {
        &mut self.layers
    }

    /// The prediction: [b, out_channels, h, w].
    ///
    /// # Errors
    /// If libtorch refuses an operation, or the observer ends the run.
    pub fn forward(&self, carry: &Carry, observer: &mut dyn Observer) -> Result<Tensor> {
        let normed = silu_in_place(self.conv_norm_out.forward(&carry.hidden_states)?)?;
        Run::new(&self.layers, observer).layer(self.conv_out, &normed)
    }
}
