//! The UNet as a chain of stages.

use std::cell::RefCell;

mod carry;
mod config;
mod ends;
mod part;
mod range;
mod stage;
mod transformer;

pub use carry::{Carry, CarryShape};
pub use config::{Depth, MidBlock, UnetConfig};
pub use ends::{Conditioning, InputBlock, InputBlockDependency, OutputBlock};
pub use ends::{Sinusoids, guidance_scale_embedding};
pub use part::{Part, PartName, Scope};
use range::WideStages;
pub use range::beyond_half_note;
use squeeze_base::error::Result;
use squeeze_base::pattern::NamePattern;
use squeeze_base::progress::{Progress, Task};
use squeeze_numerics::finite::is_finite;
pub use stage::Resample;
pub use stage::{Stage, StageName, StageSpec};
use tch::{Kind, Tensor};
pub use transformer::TransformerShape;

use super::layer::{Observer, Unobserved};
use crate::checkpoint::{Prefetched, TensorSource, TensorSpec};

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
        self.tensors_of(&self.parts().collect::<Vec<_>>())
    }
}

/// A UNet with its weights.
pub struct Unet<'a> {
    chain: UnetChain,
    input_block: InputBlock,
    stages: Stages<'a>,
    output_block: OutputBlock,
    /// The stages whose activations were beyond fp16 in a call so far.
    wide: RefCell<WideStages>,
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
            wide: RefCell::default(),
        })
    }

    /// Keeps only the input and output blocks in memory, and loads each stage before it runs.
    ///
    /// # Errors
    /// If a tensor is missing or misshapen.
    pub fn one_at_a_time(chain: UnetChain, source: impl TensorSource + 'a) -> Result<Self> {
        let (input_block, output_block) = (chain.load_input_block(&source)?, chain.load_output_block(&source)?);
        let (stages, wide) = (Stages::OneAtATime(Box::new(source)), RefCell::default());
        Ok(Unet { input_block, output_block, stages, chain, wide })
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
            carry = self.run_stage(index, spec, carry, observer)?;
        }
        self.output_block.forward(&carry, observer)
    }

    /// As [`forward`](Self::forward), unobserved and with care for fp16: where the prediction in
    /// fp16 is not finite, each stage whose output is not finite is run again in bf16 (fp32 where
    /// the device has no bf16), in this call and in all later ones, which the log says. One check
    /// of the whole prediction waits for the device. A prediction that is not finite in a wider
    /// dtype either is returned as it is.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn predict(&self, sample: &Tensor, timestep: f64, conditioning: &Conditioning) -> Result<Tensor> {
        let kind = sample.f_kind()?;
        if kind != Kind::Half {
            return self.forward(sample, timestep, conditioning, &mut Unobserved);
        }
        let prediction = self.predict_with(&mut self.wide.borrow().clone(), false, (sample, timestep, conditioning))?;
        if is_finite(&prediction)? {
            return Ok(prediction);
        }
        let mut wide = self.wide.borrow().clone();
        let again = self.predict_with(&mut wide, true, (sample, timestep, conditioning))?;
        if !is_finite(&again)? {
            return Ok(prediction);
        }
        let known = self.beyond_half();
        wide.notes().iter().filter(|note| !known.contains(note)).for_each(|note| tracing::warn!("{note}"));
        self.wide.replace(wide);
        Ok(again)
    }

    /// Sentences about the stages that compute in a wider dtype than fp16, because
    /// [`predict`](Self::predict) found their activations beyond it.
    pub fn beyond_half(&self) -> Vec<String> {
        self.wide.borrow().notes()
    }

    /// The prediction with the stages of `wide` in their own dtypes, to which those are added that
    /// need it if the outputs are `checked`.
    fn predict_with(
        &self,
        wide: &mut WideStages,
        checked: bool,
        (sample, timestep, conditioning): (&Tensor, f64, &Conditioning),
    ) -> Result<Tensor> {
        let mut carry = self.input_block.forward(sample, timestep, conditioning, &mut Unobserved)?;
        for (index, spec) in self.chain.stages.iter().enumerate() {
            let run = |carry: Carry| self.run_stage(index, spec, carry, &mut Unobserved);
            carry = match checked {
                true => wide.run_checked(spec.name(), carry, &run)?,
                false => wide.run(spec.name(), carry, &run)?,
            };
        }
        Ok(self.output_block.forward(&carry, &mut Unobserved)?.f_to_kind(sample.f_kind()?)?)
    }

    fn run_stage(&self, index: usize, spec: &StageSpec, carry: Carry, observer: &mut dyn Observer) -> Result<Carry> {
        match &self.stages {
            Stages::Resident(stages) => stages[index].forward(carry, observer),
            Stages::OneAtATime(source) => spec.load(source.as_ref())?.forward(carry, observer),
        }
    }
}
