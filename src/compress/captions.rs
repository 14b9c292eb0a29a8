//! Calibration that needs no run of the UNet: text states, and embeddings of time and text.

use std::collections::BTreeMap;

use sdxl_model::checkpoint::{Blueprint, Weights};
use sdxl_model::unet::{Conditioning, InputBlock, UnetChain};
use sdxl_model::{Layer, LayerInput, Unobserved};
use sdxl_pipeline::{PipelineFolder, PromptEncoder};
use squeeze_base::error::{Error, Result};
use squeeze_base::progress::{Progress, Task};
use squeeze_numerics::device::Placement;
use squeeze_numerics::elementwise::silu;
use tch::{Device, Kind, Tensor};

use super::gather::Gatherer;
use crate::calibration::{PromptSet, prompts_together, settings};
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
    let timesteps = set.used_timesteps()?;
    let stride = stride(timesteps.len());
    let task = Task::begin(progress, "captions", "captions", used.len());
    let embedder = Embedder { input_block, set, encoder, timesteps, stride, placement };
    let mut first = 0;
    for captions in used.chunks(prompts_together(placement.device)) {
        task.go_on()?;
        captions.iter().for_each(|caption| task.advance(caption));
        match captions {
            [caption] => embedder.add_one(folder, first, caption, &mut gatherer)?,
            captions => embedder.add_all(folder, first, captions, &mut gatherer)?,
        }
        first += captions.len();
    }
    Ok(gatherer)
}

/// What encodes and embeds captions.
struct Embedder {
    input_block: InputBlock,
    set: PromptSet,
    encoder: PromptEncoder,
    timesteps: Vec<f64>,
    /// The distance of successive timesteps in the list.
    stride: usize,
    placement: Placement,
}

impl Embedder {
    /// The timestep `time` of the caption `number`.
    fn timestep(&self, number: usize, time: usize) -> f64 {
        self.timesteps[(TIMESTEPS * number + time) * self.stride % self.timesteps.len()]
    }

    /// Adds the text states of the caption `number`, and its embeddings at its timesteps.
    fn add_one(&self, folder: &PipelineFolder, number: usize, caption: &str, gatherer: &mut Gatherer) -> Result<()> {
        let Placement { device, kind } = self.placement;
        let conditioning = self.set.guidance_of(caption, folder, &self.encoder)?.conditioning;
        gatherer.add(&LayerInput::Text, &conditioning.encoder_hidden_states)?;
        let batch = conditioning.encoder_hidden_states.size3()?.0;
        for time in 0..TIMESTEPS {
            let times = Tensor::f_full([batch], self.timestep(number, time), (Kind::Float, device))?;
            gatherer.add(&LayerInput::Time, &self.embedded(&times, &conditioning, kind)?)?;
        }
        Ok(())
    }

    /// As [`add_one`](Self::add_one) for the captions from the number `first` on, in batches.
    fn add_all(&self, folder: &PipelineFolder, first: usize, captions: &[&String], gatherer: &mut Gatherer) -> Result<()> {
        let Placement { device, kind } = self.placement;
        let texts: Vec<&str> = captions.iter().map(|caption| caption.as_str()).collect();
        let guidances = self.set.guidances_of(&texts, folder, &self.encoder)?;
        let mut by_length: BTreeMap<i64, Vec<(usize, &Conditioning)>> = BTreeMap::new();
        for (number, guidance) in (first..).zip(&guidances) {
            let length = guidance.conditioning.encoder_hidden_states.size3()?.1;
            by_length.entry(length).or_default().push((number, &guidance.conditioning));
        }
        for (numbers, conditionings) in by_length.into_values().map(|group| group.into_iter().unzip::<_, _, Vec<_>, Vec<_>>()) {
            let joined = Conditioning::join(&conditionings)?
                .ok_or_else(|| Error::internal("the conditioning of captions of one length differs in shape"))?;
            gatherer.add(&LayerInput::Text, &joined.encoder_hidden_states)?;
            let rows = joined.encoder_hidden_states.size3()?.0 / numbers.len() as i64;
            for time in 0..TIMESTEPS {
                let times: Vec<f32> = numbers.iter().map(|number| self.timestep(*number, time) as f32).collect();
                let times = Tensor::f_from_slice(&times)?.f_repeat_interleave_self_int(rows, 0, None)?.f_to_device(device)?;
                let embedded = self.embedded(&times, &joined, kind)?;
                // Each caption counts as one sample, as alone.
                gatherer.add(&LayerInput::Time, &embedded.f_view([numbers.len() as i64, rows, -1])?)?;
            }
        }
        Ok(())
    }

    /// SiLU(temb) in fp32: [b, time_embed_dim].
    fn embedded(&self, times: &Tensor, conditioning: &Conditioning, kind: Kind) -> Result<Tensor> {
        let temb = self.input_block.embed(times, conditioning, kind, &mut Unobserved)?;
        Ok(silu(&temb)?.f_to_kind(Kind::Float)?)
    }
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
    use std::path::Path;

    use super::*;
    use crate::calibration::settings;

    #[test]
    fn captions_of_a_batch_have_the_hessians_of_single_ones() {
        let folder = PipelineFolder::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("models/emoji-sdxl")).unwrap();
        let weights = folder.unet_weights().unwrap();
        let mut section = CalibrationSection::default();
        section.reading.long_prompts = true;
        let set = settings(&folder, &section).unwrap();
        let timesteps = set.scheduler.training_timesteps().unwrap();
        let embedder = Embedder {
            input_block: folder.unet.load_input_block(&weights.source(Placement::CPU)).unwrap(),
            encoder: set.encoder(&folder, Placement::CPU).unwrap(),
            stride: stride(timesteps.len()),
            set,
            timesteps,
            placement: Placement::CPU,
        };
        let long = "the cat and the dog sat on a red mat, ".repeat(12);
        let captions: Vec<String> = ["a cat", &long, "two red dogs"].map(str::to_owned).to_vec();
        let new = || shared_inputs(&folder.unet, &|_| true, Device::Cpu).unwrap();
        let (mut single, mut batched) = (new(), new());
        for (number, caption) in captions.iter().enumerate() {
            embedder.add_one(&folder, 5 + number, caption, &mut single).unwrap();
        }
        embedder.add_all(&folder, 5, &captions.iter().collect::<Vec<_>>(), &mut batched).unwrap();
        for input in [LayerInput::Text, LayerInput::Time] {
            let (ours, theirs) = (batched.hessian(&input).unwrap(), single.hessian(&input).unwrap());
            assert_eq!((ours.samples(), ours.vectors()), (theirs.samples(), theirs.vectors()));
            let (ours, theirs) = (ours.matrix().unwrap(), theirs.matrix().unwrap());
            let off = f64::try_from((&ours - &theirs).norm() / theirs.norm()).unwrap();
            assert!(off < 1e-5, "{input:?}: {off}");
        }
    }

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
