//! The UNet as a program: the computation of [`sdxl_model::unet`].

mod ends;
mod inputs;
mod noise;
mod stage;
mod transformer;

use inputs::Inputs;
pub(crate) use noise::TABLES as NOISE_TABLES;
use sdxl_model::unet::UnetChain;
use sdxl_pipeline::UnetWeights;
use squeeze_base::error::Result;
use squeeze_base::progress::{Progress, Task};

use super::{Lowered, Network};
use crate::noise_output::{NoiseOutput, Predicted};
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
    let positions = options.noise.as_ref().map(|_| noise::positions(&mut network, &inputs.timestep)).transpose()?;
    let mut timestep = inputs.timestep.clone();
    if let (Some(NoiseOutput { timesteps: Some(own), .. }), Some(positions)) = (&options.noise, &positions) {
        timestep = noise::own_timesteps(&mut network, own, positions)?;
    }
    let (mut lowering, mut hidden) = UnetLowering::begin(network, config, options, &inputs, &timestep)?;
    for stage in chain.stages() {
        hidden = lowering.stage(stage, hidden)?;
    }
    let output = match (&options.noise, &positions) {
        (Some(output), Some(positions)) if output.predicted != Predicted::Noise => {
            let prediction = lowering.output_block(config, "prediction", &hidden)?;
            noise::noise(&mut lowering.network, "noise_pred", output, positions, &prediction, &inputs.sample)?
        }
        _ => lowering.output_block(config, "noise_pred", &hidden)?,
    };
    let program = lowering.network.finish(&tensors)?;
    Ok(Lowered { program, inputs: inputs.into_vars(), outputs: vec![output] })
}
