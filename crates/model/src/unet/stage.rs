//! A stage of the chain: a down block, the mid block or an up block.

use std::fmt::{self, Display};

use squeeze_base::error::{Error, Result};
use squeeze_numerics::elementwise::silu;
use tch::Tensor;

use super::carry::{Carry, CarryShape};
use super::config::{Depth, MidBlock, UnetConfig};
use super::transformer::{Sublayer, Transformer, TransformerShape};
use crate::checkpoint::TensorSource;
use crate::layer::{ConvGeometry, Layer, Observer};
use crate::network::{Builder, LayerId, Run};
use crate::resnet::{Resnet, ResnetShape};

/// A stage's name, as in the checkpoint: `down_blocks.0`, `mid_block`, `up_blocks.2`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum StageName {
    /// `down_blocks.N`
    Down(usize),
    /// `mid_block`
    Mid,
    /// `up_blocks.N`
    Up(usize),
}

impl Display for StageName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            StageName::Down(index) => write!(f, "down_blocks.{index}"),
            StageName::Mid => f.write_str("mid_block"),
            StageName::Up(index) => write!(f, "up_blocks.{index}"),
        }
    }
}

/// The structure of a stage without weights: enough to list its layers and to load them.
#[derive(Debug, Clone)]
pub struct StageSpec {
    name: StageName,
    resnets: Vec<ResnetShape>,
    /// The transformer that follows each resnet; none for plain stages.
    transformers: Vec<TransformerShape>,
    resample: Option<Resample>,
}

/// The convolution at the end of a stage that changes the resolution.
#[derive(Debug, Clone, Copy)]
pub enum Resample {
    /// A convolution of stride 2.
    Down {
        /// Channels of input and output.
        channels: i64,
        /// Zeros around the input.
        padding: i64,
    },
    /// A convolution after an upsampling to twice the height and width.
    Up {
        /// Channels of input and output.
        channels: i64,
    },
}

impl StageSpec {
    /// The stages of a UNet, in the order of execution. This function is the only source of that
    /// order: the order of names in a file differs, since diffusers registers `up_blocks` before
    /// `mid_block`.
    #[must_use]
    pub fn chain(config: &UnetConfig) -> Vec<StageSpec> {
        let levels = config.block_out_channels.len();
        let down = (0..levels).map(|level| Self::down(config, level));
        let up = (0..levels).map(|index| Self::up(config, index));
        down.chain(Self::mid(config)).chain(up).collect()
    }

    fn down(config: &UnetConfig, level: usize) -> StageSpec {
        let output = config.block_out_channels[level];
        let input = config.block_out_channels[level.saturating_sub(1)];
        let layers = config.layers_per_block[level];
        let last = level + 1 == config.block_out_channels.len();
        StageSpec {
            name: StageName::Down(level),
            resnets: (0..layers).map(|i| resnet(config, if i == 0 { input } else { output }, output)).collect(),
            transformers: transformers(
                config,
                config.down_attention[level],
                level,
                &config.transformer_layers_per_block[level],
                layers,
            ),
            resample: (!last).then_some(Resample::Down { channels: output, padding: config.downsample_padding }),
        }
    }

    fn mid(config: &UnetConfig) -> Option<StageSpec> {
        let level = config.block_out_channels.len() - 1;
        let channels = config.block_out_channels[level];
        let (resnets, has_attention) = match config.mid_block {
            MidBlock::CrossAttention => (2, true),
            MidBlock::Resnet => (1, false),
            MidBlock::Absent => return None,
        };
        Some(StageSpec {
            name: StageName::Mid,
            resnets: vec![resnet(config, channels, channels); resnets],
            transformers: transformers(config, has_attention, level, &config.transformer_layers_per_block[level], 1),
            resample: None,
        })
    }

    fn up(config: &UnetConfig, index: usize) -> StageSpec {
        let levels = config.block_out_channels.len();
        let level = levels - 1 - index;
        let output = config.block_out_channels[level];
        // The input of the first resnet comes from the level below. The residuals are the outputs
        // of the level's down stage in reverse order, then the input of that stage.
        let below = config.block_out_channels[(level + 1).min(levels - 1)];
        let above = config.block_out_channels[level.saturating_sub(1)];
        let layers = config.layers_per_block[level] + 1;
        let resnets = (0..layers)
            .map(|i| {
                let hidden = if i == 0 { below } else { output };
                let residual = if i + 1 == layers { above } else { output };
                resnet(config, hidden + residual, output)
            })
            .collect();
        let depth = match &config.reverse_transformer_layers_per_block {
            Some(depths) => &depths[index],
            None => &config.transformer_layers_per_block[level],
        };
        StageSpec {
            name: StageName::Up(index),
            resnets,
            transformers: transformers(config, config.up_attention[index], level, depth, layers),
            resample: (index + 1 < levels).then_some(Resample::Up { channels: output }),
        }
    }

    /// The stage's name.
    #[must_use]
    pub fn name(&self) -> StageName {
        self.name
    }

    /// The shape of the carry that [`Stage::forward`] returns for a carry of shape `before`.
    ///
    /// # Panics
    /// If an up stage is given fewer residuals than the stages before it push.
    #[must_use]
    pub fn after(&self, before: &CarryShape) -> CarryShape {
        let CarryShape { hidden_states: [_, mut height, mut width], down_block_res_samples: mut residuals } = before.clone();
        for resnet in &self.resnets {
            match self.name {
                StageName::Down(_) => residuals.push([resnet.output, height, width]),
                StageName::Up(_) => {
                    residuals.pop().expect("down stages push a residual for each resnet of the up stages");
                }
                StageName::Mid => {}
            }
        }
        let channels = self.resnets.last().map_or(before.hidden_states[0], |resnet| resnet.output);
        match self.resample {
            None => {}
            Some(Resample::Down { padding, .. }) => {
                let halved = |size: i64| (size + if padding == 0 { 1 } else { 2 * padding } - 3) / 2 + 1;
                (height, width) = (halved(height), halved(width));
                residuals.push([channels, height, width]);
            }
            Some(Resample::Up { .. }) => {
                [_, height, width] = *residuals.last().expect("a residual remains for the stage after an upsampling one");
            }
        }
        CarryShape { hidden_states: [channels, height, width], down_block_res_samples: residuals }
    }

    /// The stage's resnets, in order.
    #[must_use]
    pub fn resnets(&self) -> &[ResnetShape] {
        &self.resnets
    }

    /// The transformer that follows each resnet; none for plain stages.
    #[must_use]
    pub fn transformers(&self) -> &[TransformerShape] {
        &self.transformers
    }

    /// The convolution at the end of the stage that changes the resolution, if it has one.
    #[must_use]
    pub fn resample(&self) -> Option<Resample> {
        self.resample
    }

    /// Builds the stage, reading its weights from `source`.
    ///
    /// # Errors
    /// If a tensor is missing or misshapen.
    pub fn load(&self, source: &dyn TensorSource) -> Result<Stage> {
        let mut layers = Vec::new();
        let mut top = Builder::new(source, self.name.to_string(), &mut layers);
        let mut resnets = Vec::new();
        let mut transformers = Vec::new();
        let mut units = Vec::new();
        for (i, shape) in self.resnets.iter().enumerate() {
            resnets.push(Resnet::build(&mut top.at("resnets").at(i), *shape)?);
            units.push(Unit::Resnet(i));
            if let Some(shape) = self.transformers.get(i) {
                transformers.push(Transformer::build(&mut top.at("attentions").at(i), *shape)?);
                units.push(Unit::Begin(i));
                let of_block = |block| Sublayer::ALL.map(|sublayer| Unit::Sublayer(i, block, sublayer));
                units.extend((0..shape.depth).flat_map(of_block));
                units.push(Unit::End(i));
            }
        }
        if self.resample.is_some() {
            units.push(Unit::Resample);
        }
        let resampler = match self.resample {
            None => Resampler::None,
            Some(Resample::Down { channels, padding }) => {
                let conv = top.at("downsamplers").at(0).conv2d("conv", channels, channels, 3, ConvGeometry::new(2, padding))?;
                Resampler::Down { conv, pad_after: padding == 0 }
            }
            Some(Resample::Up { channels }) => {
                Resampler::Up(top.at("upsamplers").at(0).conv2d("conv", channels, channels, 3, ConvGeometry::new(1, 1))?)
            }
        };
        Ok(Stage { name: self.name, layers, units, resnets, transformers, resampler })
    }
}

fn resnet(config: &UnetConfig, input: i64, output: i64) -> ResnetShape {
    ResnetShape { input, output, temb: Some(config.time_embed_dim), groups: config.norm_num_groups, eps: config.norm_eps }
}

fn transformers(config: &UnetConfig, has_attention: bool, level: usize, depth: &Depth, count: usize) -> Vec<TransformerShape> {
    let shape = |index| TransformerShape {
        channels: config.block_out_channels[level],
        heads: config.heads[level],
        depth: depth.of(index),
        cross_attention_dim: config.cross_attention_dim,
        linear_projection: config.use_linear_projection,
        groups: config.norm_num_groups,
    };
    (0..if has_attention { count } else { 0 }).map(shape).collect()
}

/// A stage with its weights.
#[derive(Debug)]
pub struct Stage {
    name: StageName,
    layers: Vec<Layer>,
    units: Vec<Unit>,
    resnets: Vec<Resnet>,
    transformers: Vec<Transformer>,
    resampler: Resampler,
}

/// The smallest part of a stage through which a carry can be sent: a resnet, the begin of a
/// transformer, a sublayer of one of its blocks, its end, or the resampling convolution.
#[derive(Debug, Clone, Copy)]
enum Unit {
    Resnet(usize),
    Begin(usize),
    Sublayer(usize, usize, Sublayer),
    End(usize),
    Resample,
}

#[derive(Debug)]
enum Resampler {
    None,
    /// A convolution of stride 2. Without padding, its input first gets one row and one column of
    /// zeros at the end.
    Down {
        conv: LayerId,
        pad_after: bool,
    },
    /// Nearest-neighbour upsampling to the size of the next residual, then a convolution.
    Up(LayerId),
}

impl Stage {
    /// The stage's name.
    #[must_use]
    pub fn name(&self) -> StageName {
        self.name
    }

    /// Every Conv2d and Linear of the stage, in execution order.
    #[must_use]
    pub fn layers(&self) -> &[Layer] {
        &self.layers
    }

    /// The layers, for replacing weights.
    pub fn layers_mut(&mut self) -> &mut [Layer] {
        &mut self.layers
    }

    /// The number of units: resnets, parts of transformers and of their blocks, a resampling
    /// convolution.
    #[must_use]
    pub fn units(&self) -> usize {
        self.units.len()
    }

    /// Whether the layer named `layer` belongs to unit `unit`.
    ///
    /// # Panics
    /// If there is no such unit.
    #[must_use]
    pub fn unit_has(&self, unit: usize, layer: &str) -> bool {
        let Some(path) = layer.strip_prefix(&self.name.to_string()).and_then(|path| path.strip_prefix('.')) else { return false };
        let below = |start: String| path.starts_with(&start);
        match &self.units[unit] {
            Unit::Resnet(i) => below(format!("resnets.{i}.")),
            Unit::Begin(i) => path == format!("attentions.{i}.proj_in"),
            Unit::Sublayer(i, block, sublayer) => {
                below(format!("attentions.{i}.transformer_blocks.{block}.{}.", sublayer.name()))
            }
            Unit::End(i) => path == format!("attentions.{i}.proj_out"),
            Unit::Resample => below("downsamplers.".into()) || below("upsamplers.".into()),
        }
    }

    /// Runs the stage (`CrossAttnDownBlock2D`, `UNetMidBlock2DCrossAttn`, `CrossAttnUpBlock2D` and
    /// their plain kinds).
    ///
    /// # Errors
    /// If libtorch refuses an operation, or the observer ends the run.
    pub fn forward(&self, carry: Carry, observer: &mut dyn Observer) -> Result<Carry> {
        (0..self.units()).try_fold(carry, |carry, unit| self.forward_unit(unit, carry, observer))
    }

    /// Pushes the hidden states as a residual if this is a down stage, which does so after each
    /// pair of resnet and transformer.
    fn push(&self, carry: &mut Carry) {
        if let StageName::Down(_) = self.name {
            carry.push_residual();
        }
    }

    /// Runs one unit. Running all units in order is [`forward`](Self::forward). The unit computes
    /// in the dtype of the carry's features, tokens before hidden states; weights, time embedding
    /// and text states are converted to it.
    ///
    /// # Errors
    /// As [`forward`](Self::forward), and if there is no such unit.
    pub fn forward_unit(&self, unit: usize, mut carry: Carry, observer: &mut dyn Observer) -> Result<Carry> {
        let mut run = Run::new(&self.layers, observer);
        let absent = || Error::internal(format!("`{}` has no unit {unit}", self.name));
        let outside = || Error::internal("a part of a transformer was given a carry that is not in a transformer");
        match *self.units.get(unit).ok_or_else(absent)? {
            Unit::Resnet(i) => {
                if let StageName::Up(_) = self.name {
                    carry.pop_residual()?;
                }
                // A unit computes in the dtype of the features that it is given.
                let silu_temb = silu(&carry.temb.f_to_kind(carry.hidden_states.f_kind()?)?)?;
                carry.hidden_states = self.resnets[i].forward(&carry.hidden_states, Some(&silu_temb), &mut run)?;
                // With transformers, the residual is pushed after the transformer instead.
                if self.transformers.is_empty() {
                    self.push(&mut carry);
                }
            }
            Unit::Begin(i) => carry.tokens = Some(self.transformers[i].begin(&carry.hidden_states, &mut run)?),
            Unit::Sublayer(i, block, sublayer) => {
                let tokens = carry.tokens.take().ok_or_else(outside)?;
                let text = carry.encoder_hidden_states.f_to_kind(tokens.f_kind()?)?;
                carry.tokens = Some(self.transformers[i].sublayer(block, sublayer, &tokens, &text, &mut run)?);
            }
            Unit::End(i) => {
                let tokens = carry.tokens.take().ok_or_else(outside)?;
                let input = carry.hidden_states.f_to_kind(tokens.f_kind()?)?;
                carry.hidden_states = self.transformers[i].end(&tokens, &input, &mut run)?;
                self.push(&mut carry);
            }
            Unit::Resample => match self.resampler {
                Resampler::None => {}
                Resampler::Down { conv, pad_after } => {
                    let hidden = &carry.hidden_states;
                    let padded = if pad_after { hidden.f_constant_pad_nd([0, 1, 0, 1])? } else { hidden.shallow_clone() };
                    carry.hidden_states = run.layer(conv, &padded)?;
                    carry.push_residual();
                }
                Resampler::Up(conv) => carry.hidden_states = run.layer(conv, &upsample(&carry.hidden_states, &carry)?)?,
            },
        }
        Ok(carry)
    }
}

/// Upsamples to the size of the next residual: twice the resolution, or one pixel less where the
/// size before downsampling was odd.
fn upsample(hidden: &Tensor, carry: &Carry) -> Result<Tensor> {
    let Some(next) = carry.down_block_res_samples.last() else {
        return Err(Error::internal("an up stage was given a carry without residuals: the stages ran out of order"));
    };
    let (_, _, height, width) = next.size4()?;
    Ok(hidden.f_upsample_nearest2d([height, width], None, None)?)
}
