//! The inputs of a UNet's program.

use sdxl_model::unet::UnetConfig;

use super::super::Network;
use crate::element::{ArrayType, Element};
use crate::options::{Io, Options};
use crate::program::Var;

/// The program's inputs.
pub(super) struct Inputs {
    /// Latents [b, c, h, w].
    pub sample: Var,
    /// [b].
    pub timestep: Var,
    /// Text states [b, n, c], or [b, c, 1, n] for Apple's pipeline.
    pub text: Var,
    /// Numbers of size and crop: [b, k].
    pub time_ids: Var,
    /// Pooled text [b, p].
    pub text_embeds: Var,
    /// The guidance scale's sinusoids [b, g], for a UNet that is told it.
    pub timestep_cond: Option<Var>,
}

impl Inputs {
    /// Declares the inputs; `pooled` is the width of the pooled text.
    pub(super) fn declare(network: &mut Network, config: &UnetConfig, options: &Options, pooled: i64) -> Self {
        let batch = options.batch as u64;
        let [height, width] = options.latents.map(|n| n as u64);
        let (tokens, channels) = (options.tokens as u64, config.cross_attention_dim as u64);
        // fp16 holds integers up to 2,048 only, and no fractions of timesteps.
        let (exact, text) = match options.io {
            Io::Diffusers => (Element::F32, vec![batch, tokens, channels]),
            Io::Apple => (Element::F16, vec![batch, channels, 1, tokens]),
        };
        let mut input = |name: &str, element, shape: Vec<u64>| network.input(name, ArrayType { element, shape });
        Inputs {
            sample: input("sample", Element::F16, vec![batch, config.in_channels as u64, height, width]),
            timestep: input("timestep", exact, vec![batch]),
            text: input("encoder_hidden_states", Element::F16, text),
            time_ids: input("time_ids", exact, vec![batch, options.time_ids as u64]),
            text_embeds: input("text_embeds", Element::F16, vec![batch, pooled as u64]),
            timestep_cond: config.time_cond_proj_dim.map(|width| input("timestep_cond", Element::F16, vec![batch, width as u64])),
        }
    }

    /// The inputs in the order of Apple's UNet.
    pub(super) fn into_vars(self) -> Vec<Var> {
        let Inputs { sample, timestep, text, time_ids, text_embeds, timestep_cond } = self;
        [sample, timestep, text, time_ids, text_embeds].into_iter().chain(timestep_cond).collect()
    }
}
