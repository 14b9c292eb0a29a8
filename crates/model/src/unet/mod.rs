//! The UNet as a chain of stages.

mod carry;
mod config;
mod ends;
mod part;
mod stage;
mod transformer;

pub use carry::{Carry, CarryShape};
pub use config::{Depth, MidBlock, UnetConfig};
pub use ends::{Conditioning, InputBlock, InputBlockDependency, OutputBlock};
pub use ends::{Sinusoids, guidance_scale_embedding};
pub use part::{Part, PartName, Scope};
use squeeze_base::error::Result;
use squeeze_base::pattern::NamePattern;
use squeeze_base::progress::{Progress, Task};
pub use stage::Resample;
pub use stage::{Stage, StageName, StageSpec};
use tch::Tensor;
pub use transformer::TransformerShape;

use super::layer::Observer;
use crate::checkpoint::{Blueprint, Prefetched, TensorSource, TensorSpec};

/// The UNet without weights: a list of its parts, in the order of execution.
///
/// The parts are conv_in and the embeddings ([`InputBlock`]), then the stages, then norm and
/// conv_out ([`OutputBlock`]).
#[derive(Debug, Clone)]
pub struct UnetChain {
    config: UnetConfig,
    stages: Vec<StageSpec>,
}

impl UnetChain {
    /// The chain that a config describes.
    #[must_use]
    pub fn new(config: UnetConfig) -> Self {
        UnetChain { stages: StageSpec::chain(&config), config }
    }

    /// The architecture.
    #[must_use]
    pub fn config(&self) -> &UnetConfig {
        &self.config
    }

    /// The stages, in the order in which they run.
    #[must_use]
    pub fn stages(&self) -> &[StageSpec] {
        &self.stages
    }

    /// The stages that one of `patterns` matches, in the order in which they run, whatever the
    /// order of the patterns.
    pub fn matching<'a>(&'a self, patterns: &'a [NamePattern]) -> impl Iterator<Item = &'a StageSpec> {
        self.stages.iter().filter(|stage| {
            let name = stage.name().to_string();
            patterns.iter().any(|pattern| pattern.matches(&name))
        })
    }

    /// Loads the input block, which runs before the stages.
    ///
    /// # Errors
    /// If a tensor is missing or misshapen.
    pub fn load_input_block(&self, source: &dyn TensorSource) -> Result<InputBlock> {
        InputBlock::load(&self.config, source)
    }

    /// Loads the output block, which runs after the stages.
    ///
    /// # Errors
    /// If a tensor is missing or misshapen.
    pub fn load_output_block(&self, source: &dyn TensorSource) -> Result<OutputBlock> {
        OutputBlock::load(&self.config, source)
    }

    /// The shape of the carry that [`InputBlock::forward`] computes from latents of this height and
    /// width.
    #[must_use]
    pub fn first_carry(&self, height: i64, width: i64) -> CarryShape {
        let first = [self.config.block_out_channels[0], height, width];
        CarryShape { hidden_states: first, down_block_res_samples: vec![first] }
    }

    /// Every tensor of the UNet, in execution order.
    ///
    /// # Errors
    /// If libtorch cannot make a tensor at all.
    pub fn tensors(&self) -> Result<Vec<TensorSpec>> {
        let blueprint = Blueprint::default();
        self.load_input_block(&blueprint)?;
        for stage in &self.stages {
            stage.load(&blueprint)?;
        }
        self.load_output_block(&blueprint)?;
        Ok(blueprint.into_tensors())
    }
}

/// A UNet with its weights.
pub struct Unet<'a> {
    chain: UnetChain,
    input_block: InputBlock,
    stages: Stages<'a>,
    output_block: OutputBlock,
}

/// The storage of a UNet's stages between two forward passes.
enum Stages<'a> {
    Resident(Vec<Stage>),
    /// Each stage is loaded before it runs and dropped after it: memory for one stage, and the
    /// weights are read at every forward pass.
    OneAtATime(Box<dyn TensorSource + 'a>),
}

impl<'a> Unet<'a> {
    /// Loads every stage.
    ///
    /// # Errors
    /// If a tensor is missing or misshapen.
    pub fn resident(chain: UnetChain, source: impl TensorSource + Sync, progress: &dyn Progress) -> Result<Self> {
        let task = Task::begin(progress, "loading the UNet", "stages", chain.stages.len());
        let mut stages = Vec::new();
        for spec in &chain.stages {
            task.advance(&spec.name().to_string());
            stages.push(spec.load(&Prefetched::for_network(&source, |source| spec.load(source))?)?);
        }
        Ok(Unet {
            input_block: chain.load_input_block(&source)?,
            output_block: chain.load_output_block(&source)?,
            stages: Stages::Resident(stages),
            chain,
        })
    }

    /// Keeps only the input and output blocks in memory, and loads each stage before it runs.
    ///
    /// # Errors
    /// If a tensor is missing or misshapen.
    pub fn one_at_a_time(chain: UnetChain, source: impl TensorSource + 'a) -> Result<Self> {
        let (input_block, output_block) = (chain.load_input_block(&source)?, chain.load_output_block(&source)?);
        Ok(Unet { input_block, output_block, stages: Stages::OneAtATime(Box::new(source)), chain })
    }

    /// The architecture.
    #[must_use]
    pub fn chain(&self) -> &UnetChain {
        &self.chain
    }

    /// The prediction for noisy latents `sample` [b, c, h, w] at `timestep`: [b, out_channels, h,
    /// w].
    ///
    /// # Errors
    /// If libtorch refuses an operation, a stage cannot be loaded, or the observer ends the run.
    pub fn forward(
        &self,
        sample: &Tensor,
        timestep: f64,
        conditioning: &Conditioning,
        observer: &mut dyn Observer,
    ) -> Result<Tensor> {
        let mut carry = self.input_block.forward(sample, timestep, conditioning, observer)?;
        for (index, spec) in self.chain.stages.iter().enumerate() {
            carry = match &self.stages {
                Stages::Resident(stages) => stages[index].forward(carry, observer)?,
                Stages::OneAtATime(source) => spec.load(source.as_ref())?.forward(carry, observer)?,
            };
        }
        self.output_block.forward(&carry, observer)
    }
}
