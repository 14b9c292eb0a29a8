//! The parts of the chain, loaded and run one at a time: the input block, the stages, the output
//! block.

use std::fmt::{self, Display};

use squeeze_base::error::{Error, Result};

use super::{Carry, InputBlock, OutputBlock, Stage, StageName, UnetChain};
use crate::checkpoint::{Blueprint, TensorSource, TensorSpec};
use crate::layer::{Layer, Observer};

/// The name of a part of the chain. The order is that of execution within each kind of stage; for
/// the order of a whole UNet see [`UnetChain::parts`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum PartName {
    /// conv_in and the embeddings, printed as `head`.
    InputBlock,
    /// A down, mid or up stage.
    Stage(StageName),
    /// The last norm and conv_out, printed as `tail`.
    OutputBlock,
}

impl Display for PartName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PartName::InputBlock => f.write_str("head"),
            PartName::Stage(name) => Display::fmt(name, f),
            PartName::OutputBlock => f.write_str("tail"),
        }
    }
}

/// The portion of a part that a carry is sent through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// The whole part.
    Whole,
    /// One of its blocks, by index.
    Block(usize),
}

/// A part with its weights.
#[derive(Debug)]
pub enum Part {
    /// See [`PartName::InputBlock`].
    InputBlock(InputBlock),
    /// See [`PartName::Stage`].
    Stage(Stage),
    /// See [`PartName::OutputBlock`].
    OutputBlock(OutputBlock),
}

impl UnetChain {
    /// The names of all parts, in the order of execution.
    pub fn parts(&self) -> impl Iterator<Item = PartName> {
        let stages = self.stages().iter().map(|spec| PartName::Stage(spec.name()));
        [PartName::InputBlock].into_iter().chain(stages).chain([PartName::OutputBlock])
    }

    /// Every tensor of the given parts, in execution order.
    ///
    /// # Errors
    /// If the chain has no such part, or libtorch cannot make a tensor at all.
    pub fn tensors_of(&self, parts: &[PartName]) -> Result<Vec<TensorSpec>> {
        let blueprint = Blueprint::default();
        for part in parts {
            self.load_part(*part, &blueprint)?;
        }
        Ok(blueprint.into_tensors())
    }

    /// Loads the part `name`, reading its weights from `source`.
    ///
    /// # Errors
    /// If the chain has no such stage, or a tensor is missing or misshapen.
    pub fn load_part(&self, name: PartName, source: &dyn TensorSource) -> Result<Part> {
        Ok(match name {
            PartName::InputBlock => Part::InputBlock(self.load_input_block(source)?),
            PartName::Stage(stage) => {
                let absent = || Error::Argument(format!("the UNet has no stage `{stage}`"));
                let spec = self.stages().iter().find(|spec| spec.name() == stage).ok_or_else(absent)?;
                Part::Stage(spec.load(source)?)
            }
            PartName::OutputBlock => Part::OutputBlock(self.load_output_block(source)?),
        })
    }
}

impl Part {
    /// Every Conv2d and Linear of the part, in execution order.
    #[must_use]
    pub fn layers(&self) -> &[Layer] {
        match self {
            Part::InputBlock(block) => block.layers(),
            Part::Stage(stage) => stage.layers(),
            Part::OutputBlock(block) => block.layers(),
        }
    }

    /// The layers, for replacing weights.
    pub fn layers_mut(&mut self) -> &mut [Layer] {
        match self {
            Part::InputBlock(block) => block.layers_mut(),
            Part::Stage(stage) => stage.layers_mut(),
            Part::OutputBlock(block) => block.layers_mut(),
        }
    }

    /// The number of blocks that a carry can be sent through one at a time. The input and output
    /// blocks are one block each.
    #[must_use]
    pub fn blocks(&self) -> usize {
        match self {
            Part::Stage(stage) => stage.units(),
            Part::InputBlock(_) | Part::OutputBlock(_) => 1,
        }
    }

    /// Whether the layer `name` runs in `scope`.
    #[must_use]
    pub fn scope_has(&self, scope: Scope, name: &str) -> bool {
        match (self, scope) {
            (Part::Stage(stage), Scope::Block(block)) => stage.unit_has(block, name),
            (Part::InputBlock(_) | Part::OutputBlock(_), _) | (Part::Stage(_), Scope::Whole) => true,
        }
    }

    /// Sends `carry` through `scope`. The output block puts its prediction in the place of the
    /// hidden states.
    ///
    /// # Errors
    /// If libtorch refuses an operation, or the observer ends the run; for the input block, which
    /// makes the first carry and takes none.
    pub fn forward(&self, scope: Scope, carry: Carry, observer: &mut dyn Observer) -> Result<Carry> {
        match (self, scope) {
            (Part::InputBlock(_), _) => Err(Error::internal("the input block takes no carry")),
            (Part::Stage(stage), Scope::Whole) => stage.forward(carry, observer),
            (Part::Stage(stage), Scope::Block(block)) => stage.forward_unit(block, carry, observer),
            (Part::OutputBlock(block), _) => Ok(Carry { hidden_states: block.forward(&carry, observer)?, ..carry }),
        }
    }
}
