//! Calibration that needs no run of the UNet: text states, and embeddings of time and text.

use sdxl_model::checkpoint::{Blueprint, Weights};
use sdxl_model::unet::UnetChain;
use sdxl_model::{Layer, LayerInput, Unobserved};
use sdxl_pipeline::PipelineFolder;
use squeeze_base::error::Result;
use squeeze_base::progress::{Progress, Task};
use squeeze_numerics::elementwise::silu;
use tch::{Device, Kind, Tensor};

use super::gather::Gatherer;
use crate::calibration::settings;
use crate::config::CalibrationSection;
use crate::recipe::RunOptions;

/// Timesteps for each caption.
const TIMESTEPS: usize = 4;

/// Prompts that are only encoded.
#[derive(Debug, Clone, Copy)]
pub(super) struct Captions<'a> {
    pub lines: &'a [String],
    /// How many of them are used, and the guidance and picture size they are encoded for.
    pub section: &'a CalibrationSection,
}

/// The Hessians of the layers that are given the text states, or SiLU(temb), from captions: each is
/// encoded, and its pooled text embedded at a few of all timesteps. A caption counts as a call of
/// the UNet does, with the half of the negative prompt. Layers for which `is_wanted` is false have
/// none.
///
/// # Errors
/// If the captions cannot be encoded.
pub(super) fn gather(
    folder: &PipelineFolder,
    weights: &Weights,
    captions: Captions<'_>,
    is_wanted: &dyn Fn(&Layer) -> bool,
    options: &RunOptions,
    progress: &dyn Progress,
) -> Result<Gatherer> {
    let Captions { lines, section } = captions;
    if lines.is_empty() {
        return Ok(Gatherer::default());
    }
    let (count, wanted) = (lines.len(), section.captions_nsamples);
    let used: Vec<&String> =
        if count > wanted { (0..wanted).map(|k| &lines[k * count / wanted]).collect() } else { lines.iter().collect() };
    let placement = options.placement();
    let mut gatherer = shared_inputs(&folder.unet, is_wanted, placement.device)?;
    let input_block = folder.unet.load_input_block(&weights.narrow_source(placement))?;
    let set = settings(folder, section)?;
    let encoder = set.encoder(folder, placement)?;
    let timesteps = set.scheduler.training_timesteps()?;
    let stride = stride(timesteps.len());
    let task = Task::begin(progress, "captions", "captions", used.len());
    for (number, caption) in used.iter().enumerate() {
        task.go_on()?;
        task.advance(caption);
        let conditioning = set.guidance_of(caption, folder, &encoder)?.conditioning;
        gatherer.add(&LayerInput::Text, &conditioning.encoder_hidden_states)?;
        let batch = conditioning.encoder_hidden_states.size3()?.0;
        // The input block embeds latents too; the smallest do.
        let sample = Tensor::f_zeros([batch, folder.unet.config().in_channels, 1, 1], (placement.kind, placement.device))?;
        for time in 0..TIMESTEPS {
            let timestep = timesteps[(TIMESTEPS * number + time) * stride % timesteps.len()];
            let carry = input_block.forward(&sample, timestep, &conditioning, &mut Unobserved)?;
            gatherer.add(&LayerInput::Time, &silu(&carry.temb)?.f_to_kind(Kind::Float)?)?;
        }
    }
    Ok(gatherer)
}

/// A gatherer for the inputs that are the same in all stages.
fn shared_inputs(chain: &UnetChain, is_wanted: &dyn Fn(&Layer) -> bool, device: Device) -> Result<Gatherer> {
    let blueprint = Blueprint::default();
    let stages = chain.stages().iter().map(|spec| spec.load(&blueprint)).collect::<Result<Vec<_>>>()?;
    let layers = stages.iter().flat_map(|stage| stage.layers());
    Gatherer::new(layers.filter(|layer| !matches!(layer.input(), LayerInput::Features(_)) && is_wanted(layer)), device)
}

/// A stride through `timesteps` timesteps, modulo their number, that comes to each of them before
/// it repeats one, because the two numbers have no common factor. Successive timesteps are far
/// apart: the stride is 619 for 1,000.
fn stride(timesteps: usize) -> usize {
    let have_common_factor = |mut a: usize, mut b: usize| {
        while b > 0 {
            (a, b) = (b, a % b);
        }
        a > 1
    };
    let first = (timesteps * 619 / 1000).max(1);
    (first..).find(|stride| !have_common_factor(*stride, timesteps)).expect("some stride has no common factor with the number")
}

#[cfg(test)]
mod tests {
    use super::stride;

    #[test]
    fn every_timestep_has_its_turn() {
        assert_eq!(stride(1000), 619);
        for timesteps in [2, 3, 50, 619, 1238, 4000] {
            let stride = stride(timesteps);
            let mut seen: Vec<usize> = (0..timesteps).map(|turn| turn * stride % timesteps).collect();
            seen.sort_unstable();
            assert!(seen.iter().enumerate().all(|(index, timestep)| index == *timestep), "{timesteps}");
        }
    }
}
