//! The inputs of a UNet's program.

use sdxl_model::unet::UnetConfig;
use squeeze_base::error::{Error, Result};

use super::super::Network;
use crate::element::{ArrayType, Element};
use crate::options::{Io, Options};
use crate::program::Var;

/// The program's inputs, in the order of Apple's UNet: latents `sample` [b, c, h, w]; `timestep`
/// [b]; text states `encoder_hidden_states` [b, n, c], or [b, c, 1, n] for Apple's pipeline;
/// numbers of size and crop `time_ids` [b, k]; pooled text `text_embeds` [b, p]; and for a UNet
/// that is told the guidance scale its sinusoids `timestep_cond` [b, g].
pub(super) struct Inputs(Vec<Var>);

impl Inputs {
    /// Declares the inputs called `names`; `pooled` is the width of the pooled text.
    pub(super) fn declare(
        network: &mut Network,
        config: &UnetConfig,
        options: &Options,
        pooled: i64,
        names: &[&'static str],
    ) -> Self {
        let types = types(config, options, pooled).into_iter().filter(|(name, _)| names.contains(name));
        Inputs(types.map(|(name, array)| network.input(name, array)).collect())
    }

    /// The input `name`, if the program has it.
    pub(super) fn find(&self, name: &str) -> Option<&Var> {
        self.0.iter().find(|input| input.name == name)
    }

    /// The input `name`.
    ///
    /// # Errors
    /// [`Error::Internal`] if the program does not have it.
    pub(super) fn get(&self, name: &str) -> Result<&Var> {
        self.find(name).ok_or_else(|| Error::internal(format!("the program has no input `{name}`")))
    }

    /// All inputs, in order.
    pub(super) fn into_vars(self) -> Vec<Var> {
        self.0
    }
}

/// The types of a UNet's inputs.
fn types(config: &UnetConfig, options: &Options, pooled: i64) -> Vec<(&'static str, ArrayType)> {
    let batch = options.batch as u64;
    let [height, width] = options.latents.map(|n| n as u64);
    let (tokens, channels) = (options.tokens as u64, config.cross_attention_dim as u64);
    // fp16 holds integers up to 2,048 only, and no fractions of timesteps.
    let (exact, text) = match options.io {
        Io::Diffusers => (Element::F32, vec![batch, tokens, channels]),
        Io::Apple => (Element::F16, vec![batch, channels, 1, tokens]),
    };
    let guidance = config.time_cond_proj_dim.unwrap_or_default() as u64;
    let input = |name, element, shape: Vec<u64>| (name, ArrayType { element, shape });
    vec![
        input("sample", Element::F16, vec![batch, config.in_channels as u64, height, width]),
        input("timestep", exact, vec![batch]),
        input("encoder_hidden_states", Element::F16, text),
        input("time_ids", exact, vec![batch, options.time_ids as u64]),
        input("text_embeds", Element::F16, vec![batch, pooled as u64]),
        input("timestep_cond", Element::F16, vec![batch, guidance]),
    ]
}
