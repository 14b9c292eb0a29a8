//! The UNet as a program: the computation of [`sdxl_model::unet`].

mod ends;
mod inputs;
mod stage;
mod transformer;

use inputs::Inputs;
use sdxl_model::unet::UnetChain;
use sdxl_pipeline::UnetWeights;
use squeeze_base::error::Result;
use squeeze_base::progress::{Progress, Task};

use super::{Lowered, Network};
use crate::options::Options;
use crate::program::{ProgramBuilder, Var};

/// A UNet's program after its input block.
struct UnetLowering<'a> {
    network: Network<'a>,
    /// SiLU of the embedding of time, text and sizes, which all resnets share: [b, c], or
    /// [b, c, 1, 1] in the split layout.
    silu_temb: Var,
    /// The text states, as tokens of the layout.
    text: Var,
    /// The skip connections that no up stage has used yet.
    residuals: Vec<Var>,
}

/// Lowers a UNet.
///
/// # Errors
/// If an option does not fit it, or a weight cannot be read or written.
pub(crate) fn lower(
    chain: &UnetChain,
    weights: UnetWeights,
    options: &Options,
    program: ProgramBuilder,
    progress: &dyn Progress,
) -> Result<Lowered> {
    let config = chain.config();
    let pooled = options.check(config)?;
    let tensors = chain.tensors()?;
    let task = Task::begin(progress, "writing the package", "tensors", tensors.len());
    let mut network = Network::new(program, &weights, options.layout, task);
    let inputs = Inputs::declare(&mut network, config, options, pooled);
    let (mut lowering, mut hidden) = UnetLowering::begin(network, config, options, &inputs)?;
    for stage in chain.stages() {
        hidden = lowering.stage(stage, hidden)?;
    }
    let output = lowering.output_block(config, &hidden)?;
    let program = lowering.network.finish(&tensors)?;
    Ok(Lowered { program, inputs: inputs.into_vars(), outputs: vec![output] })
}
