//! The consecutive parts of a UNet that one package computes, and the tensors between two packages.

use std::ops::Range;

use sdxl_model::checkpoint::TensorSpec;
use sdxl_model::unet::{CarryShape, PartName, StageName, StageSpec, UnetChain};
use sdxl_pipeline::UnetWeights;
use squeeze_base::error::{Error, Result};

use super::element::{ArrayType, Element};
use super::options::{BoundarySizes, Layout};

/// Consecutive parts of a UNet's chain: all of them, or those of one of two chunks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Portion {
    /// All parts of the chain.
    chain: Vec<PartName>,
    /// The portion's parts among them.
    range: Range<usize>,
}

/// The name of the image features between two chunks.
pub(super) const HIDDEN_STATES: &str = "hidden_states";
/// The name of the embedding between two chunks, which all resnets share.
pub(super) const SILU_TEMB: &str = "silu_temb";

/// The beginning of the names of skip connections between two chunks.
pub(super) const SKIPS: &str = "down_block_res_samples_";

/// The name of a skip connection between two chunks. Skip connections are numbered from 0 in the
/// order in which the UNet makes them: 0 is the output of `conv_in`.
pub(super) fn skip_name(index: usize) -> String {
    format!("{SKIPS}{index}")
}

impl Portion {
    /// All parts.
    pub(super) fn whole(chain: &UnetChain) -> Self {
        let chain: Vec<PartName> = chain.parts().collect();
        Portion { range: 0..chain.len(), chain }
    }

    /// Two portions, cut between the two parts where the bytes of the stored weights before the cut
    /// come nearest to half of all; at the first such place.
    ///
    /// # Errors
    /// If a compressed weight is missing.
    pub(super) fn halves(chain: &UnetChain, weights: UnetWeights) -> Result<[Self; 2]> {
        let parts: Vec<PartName> = chain.parts().collect();
        let mut sums = vec![0u64];
        for part in &parts {
            let tensors = chain.tensors_of(&[*part])?;
            let bytes = tensors.iter().map(|tensor| weights.stored_bytes(&tensor.name, &tensor.shape)).sum::<Result<u64>>()?;
            sums.push(sums.last().expect("the list begins with 0") + bytes);
        }
        let all = sums[parts.len()];
        let cut = (1..parts.len()).min_by_key(|at| (2 * sums[*at]).abs_diff(all));
        let cut = cut.ok_or_else(|| Error::internal("a UNet has an input block and an output block"))?;
        let portion = |range| Portion { chain: parts.clone(), range };
        Ok([portion(0..cut), portion(cut..parts.len())])
    }

    /// The portion that consists of the parts called `names`; `None` if they are not consecutive
    /// parts of the chain.
    pub(super) fn named(chain: &UnetChain, names: &[String]) -> Option<Self> {
        let chain: Vec<PartName> = chain.parts().collect();
        let printed: Vec<String> = chain.iter().map(ToString::to_string).collect();
        let start = printed.iter().position(|name| Some(name) == names.first())?;
        let range = start..start + names.len();
        (printed.get(range.clone())? == names).then_some(Portion { chain, range })
    }

    /// The parts, in order.
    pub(super) fn parts(&self) -> &[PartName] {
        &self.chain[self.range.clone()]
    }

    /// Whether these are all parts of the chain.
    pub(super) fn is_whole(&self) -> bool {
        self.begins() && self.ends()
    }

    /// Whether the input block is one of the parts.
    pub(super) fn begins(&self) -> bool {
        self.range.start == 0
    }

    /// Whether the output block is one of the parts.
    pub(super) fn ends(&self) -> bool {
        self.range.end == self.chain.len()
    }

    /// The stages among the parts.
    pub(super) fn stages<'a>(&'a self, chain: &'a UnetChain) -> impl Iterator<Item = &'a StageSpec> {
        chain.stages().iter().filter(|stage| self.parts().contains(&PartName::Stage(stage.name())))
    }

    /// Every tensor of the parts, in execution order.
    ///
    /// # Errors
    /// If libtorch cannot make a tensor at all.
    pub(super) fn tensors(&self, chain: &UnetChain) -> Result<Vec<TensorSpec>> {
        chain.tensors_of(self.parts())
    }

    /// The names of the UNet's own inputs that the parts read, in the order of Apple's UNet. A
    /// whole UNet has all of them. If the program `converts` the prediction into noise, the output
    /// block's also reads the noisy latents and their timestep.
    pub(super) fn inputs(&self, chain: &UnetChain, converts: bool) -> Vec<&'static str> {
        let latents = self.begins() || (converts && self.ends());
        let has_attention = self.stages(chain).any(|stage| stage.transformers().iter().any(|shape| shape.depth > 0));
        let guided = chain.config().time_cond_proj_dim.is_some();
        let inputs = [
            ("sample", latents),
            ("timestep", latents),
            ("encoder_hidden_states", has_attention || self.is_whole()),
            ("time_ids", self.begins()),
            ("text_embeds", self.begins()),
            ("timestep_cond", self.begins() && guided),
        ];
        inputs.into_iter().filter(|(_, read)| *read).map(|(name, _)| name).collect()
    }

    /// The tensors that the chunk before passes to these parts; none for parts that begin the UNet.
    pub(super) fn passed_in(&self, chain: &UnetChain, sizes: BoundarySizes) -> Vec<(String, ArrayType)> {
        if self.begins() { Vec::new() } else { self.boundary(chain, sizes, self.range.start) }
    }

    /// The tensors that these parts pass to the next chunk; none for parts that end the UNet.
    pub(super) fn passed_on(&self, chain: &UnetChain, sizes: BoundarySizes) -> Vec<(String, ArrayType)> {
        if self.ends() { Vec::new() } else { self.boundary(chain, sizes, self.range.end) }
    }

    /// The tensors that the parts from `at` on read from those before, in fp32: the image features,
    /// the skip connections that are left, and the embedding if a resnet follows. Features that are
    /// the newest skip connection are not passed twice.
    fn boundary(&self, chain: &UnetChain, sizes: BoundarySizes, at: usize) -> Vec<(String, ArrayType)> {
        let BoundarySizes { batch, latents: [height, width], layout } = sizes;
        let (before, after) = self.chain.split_at(at);
        let stages = chain.stages().iter().filter(|stage| before.contains(&PartName::Stage(stage.name())));
        let shape = stages.fold(chain.first_carry(height, width), |shape, stage| stage.after(&shape));
        let CarryShape { hidden_states, down_block_res_samples } = shape;
        let array = |shape: &[i64]| ArrayType::new(Element::F32, shape.iter().map(|n| *n as u64).collect::<Vec<_>>());
        let image = |[channels, height, width]: [i64; 3]| array(&[batch, channels, height, width]);
        let mut passed = Vec::new();
        if !matches!(before.last(), None | Some(PartName::InputBlock | PartName::Stage(StageName::Down(_)))) {
            passed.push((HIDDEN_STATES.to_owned(), image(hidden_states)));
        }
        passed.extend(down_block_res_samples.iter().enumerate().map(|(index, shape)| (skip_name(index), image(*shape))));
        if after.iter().any(|part| matches!(part, PartName::Stage(_))) {
            let width = chain.config().time_embed_dim;
            let shape: &[i64] = match layout {
                Layout::Linear => &[batch, width],
                Layout::SplitEinsum => &[batch, width, 1, 1],
            };
            passed.push((SILU_TEMB.to_owned(), array(shape)));
        }
        passed
    }
}
