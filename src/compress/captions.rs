//! Calibration that needs no run of the UNet: text states, and embeddings of time and text.

use tch::{Device, Kind, Tensor};

use super::Gatherer;
use crate::checkpoint::{Blueprint, Weights};
use crate::config::CalibrationSection;
use crate::elementwise::silu;
use crate::error::Result;
use crate::model::unet::{Conditioning, UnetChain};
use crate::model::{Layer, LayerInput, Unobserved};
use crate::pipeline::{Guidance, PipelineFolder, PromptEncoder};
use crate::progress::{Progress, Task};

use super::RunOptions;

/// Timesteps for each caption.
const TIMES: usize = 4;

/// The Hessians of the layers that see only the text states, or only SiLU(temb), from `captions`: each is encoded, and its
/// pooled text embedded at a few of all timesteps. A caption counts as a call of the UNet does, with the negative prompt's half.
///
/// # Errors
/// If the captions cannot be encoded.
pub(super) fn gather(
    folder: &PipelineFolder,
    weights: &Weights,
    section: &CalibrationSection,
    captions: &[String],
    treated: &dyn Fn(&Layer) -> bool,
    options: &RunOptions,
    progress: &dyn Progress,
) -> Result<Gatherer> {
    if captions.is_empty() {
        return Ok(Gatherer::default());
    }
    let (count, wanted) = (captions.len(), section.captions_nsamples);
    let captions: Vec<&String> = if count > wanted {
        (0..wanted).filter_map(|k| captions.get(k * count / wanted)).collect()
    } else {
        captions.iter().collect()
    };
    let mut gatherer = shared_inputs(&folder.unet, treated, options.placement().device)?;
    let placement = options.placement();
    let encoder = PromptEncoder::load(folder, placement)?;
    let head = folder.unet.load_head(&weights.narrow_source(placement))?;
    let size = folder.picture_size(section.size)?;
    let timesteps = folder.scheduler.train_timesteps()?;
    let stride = stride(timesteps);
    let task = Task::begin(progress, "captions", "captions", captions.len());
    for (number, caption) in captions.iter().enumerate() {
        task.go_on()?;
        task.advance(caption);
        let Conditioning { encoder_hidden_states, text_embeds, time_ids } =
            Guidance::encode(&encoder, folder, caption, None, section.guidance, size)?.conditioning;
        gatherer.add(&LayerInput::Text, &encoder_hidden_states)?;
        let batch = encoder_hidden_states.size3()?.0;
        // The head embeds latents too; the smallest do.
        let sample = Tensor::f_zeros([batch, folder.unet.config().in_channels, 1, 1], (placement.kind, placement.device))?;
        let told = Conditioning { encoder_hidden_states, text_embeds, time_ids };
        for time in 0..TIMES {
            let timestep = (TIMES * number + time) * stride % timesteps;
            let carry = head.forward(&sample, timestep as f64, &told, &mut Unobserved)?;
            gatherer.add(&LayerInput::Time, &silu(&carry.temb)?.f_to_kind(Kind::Float)?)?;
        }
    }
    Ok(gatherer)
}

/// A gatherer for what is the same in all stages.
fn shared_inputs(chain: &UnetChain, treated: &dyn Fn(&Layer) -> bool, device: Device) -> Result<Gatherer> {
    let blueprint = Blueprint::default();
    let stages = chain.stages().iter().map(|spec| spec.load(&blueprint)).collect::<Result<Vec<_>>>()?;
    let layers = stages.iter().flat_map(|stage| stage.layers());
    Gatherer::new(layers.filter(|layer| !matches!(layer.input(), LayerInput::Features(_)) && treated(layer)), device)
}

/// Steps of this length through `timesteps` of them, over and over, come to each before they come to one again, as the two numbers have no
/// common factor; and neighbours are far apart: 619 for 1,000.
fn stride(timesteps: usize) -> usize {
    let have_common_factor = |mut a: usize, mut b: usize| {
        while b > 0 {
            (a, b) = (b, a % b);
        }
        a > 1
    };
    let first = (timesteps * 619 / 1000).max(1);
    (first..).find(|stride| !have_common_factor(*stride, timesteps)).unwrap_or(1)
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
