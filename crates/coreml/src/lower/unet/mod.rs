//! The UNet as a program: the computation of [`sdxl_model::unet`].

mod boundary;
mod ends;
mod inputs;
mod noise;
mod stage;
mod transformer;

use inputs::Inputs;
pub(crate) use noise::tables as noise_tables;
use sdxl_model::unet::UnetChain;
use sdxl_pipeline::UnetWeights;
use squeeze_base::error::Result;
use squeeze_base::progress::{Progress, Task};

use super::{Lowered, Network};
use crate::noise_output::NoiseOutput;
use crate::options::Options;
use crate::portion::Portion;
use crate::program::{ProgramBuilder, Var};

/// A UNet's program after its input block.
struct UnetLowering<'a> {
    network: Network<'a>,
    /// SiLU of the embedding of time, text and sizes, which all resnets share: [b, c], or
    /// [b, c, 1, 1] in the split layout; `None` in a chunk without resnets.
    silu_temb: Option<Var>,
    /// The text states, as tokens of the layout; `None` in a chunk without transformers.
    text: Option<Var>,
    /// The skip connections that no up stage has used yet.
    residuals: Vec<Var>,
}

/// Lowers a portion of a UNet. A chunk that does not begin the UNet has inputs for what the chunk
/// before it passes on, after the UNet's own; a chunk that does not end it has outputs for the next
/// one.
///
/// # Errors
/// If an option does not fit it, or a weight cannot be read or written.
pub(crate) fn lower(
    chain: &UnetChain,
    weights: UnetWeights,
    options: &Options,
    portion: &Portion,
    program: ProgramBuilder,
    progress: &dyn Progress,
) -> Result<Lowered> {
    let config = chain.config();
    let pooled = options.check(config)?;
    let tensors = portion.tensors(chain)?;
    let task = Task::begin(progress, "writing the package", "tensors", tensors.len());
    let mut network = Network::new(program, &weights, options.layout, task);
    let noise = options.noise.as_ref().filter(|noise| noise.is_made_in(portion.begins(), portion.ends()));
    let converts = noise.is_some_and(NoiseOutput::converts);
    let inputs = Inputs::declare(&mut network, config, options, pooled, &portion.inputs(chain, converts));
    let positions = noise.map(|_| noise::positions(&mut network, inputs.get("timestep")?)).transpose()?;
    let sizes = options.boundary_sizes();
    let mut passed = Vec::new();
    let (mut lowering, mut hidden) = if portion.begins() {
        let timestep = match (noise, &positions) {
            (Some(NoiseOutput { timesteps: Some(own), .. }), Some(positions)) => {
                noise::own_timesteps(&mut network, own, positions)?
            }
            _ => inputs.get("timestep")?.clone(),
        };
        UnetLowering::begin(network, config, options, &inputs, &timestep)?
    } else {
        let text = (options.io, inputs.find("encoder_hidden_states"));
        let (lowering, hidden, vars) = UnetLowering::resume(network, portion.passed_in(chain, sizes), text)?;
        passed = vars;
        (lowering, hidden)
    };
    for stage in portion.stages(chain) {
        hidden = lowering.stage(stage, hidden)?;
    }
    let outputs = match (noise, &positions) {
        _ if !portion.ends() => lowering.pass_on(&hidden, &portion.passed_on(chain, sizes))?,
        (Some(output), Some(positions)) if output.converts() => {
            let prediction = lowering.output_block(config, "prediction", &hidden)?;
            let sample = inputs.get("sample")?;
            vec![noise::noise(&mut lowering.network, "noise_pred", output, positions, &prediction, sample)?]
        }
        _ => vec![lowering.output_block(config, "noise_pred", &hidden)?],
    };
    let program = lowering.network.finish(&tensors)?;
    let inputs = inputs.into_vars().into_iter().chain(passed).collect();
    Ok(Lowered { program, inputs, outputs })
}
