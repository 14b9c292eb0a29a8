//! What a network is calibrated on: token ids, final latents, or their pictures.

use sdxl_model::States;
use sdxl_model::text::ClipText;
use sdxl_model::vae::VaeDecoder;
use sdxl_pipeline::{PipelineFolder, TextPart};
use squeeze_base::error::{Error, Result};
use squeeze_base::progress::{Progress, Task};
use tch::{Device, Kind, Tensor};

use super::amount::evenly;
use super::prepare::PreparedNetwork;
use crate::calibration::final_latents;
use crate::compress::workspace::Workspace;
use crate::config::{CalibrationSection, Prompts};

/// Texts that run through an encoder as one batch.
pub(super) const TEXTS_TOGETHER: usize = 8;

/// The states before the first layer of `encoder`, of each batch of `texts`.
///
/// # Errors
/// If a text cannot be tokenized.
pub(super) fn of_texts(
    folder: &PipelineFolder,
    part: &TextPart,
    encoder: &ClipText,
    texts: &[String],
    long_prompts: bool,
) -> Result<Vec<States>> {
    let tokenizer = folder.tokenizer(part)?;
    let mut pieces: Vec<Vec<i64>> = Vec::new();
    for text in texts {
        match long_prompts {
            true => pieces.extend(tokenizer.pieces(text)?),
            // What a text has beyond the length is not read, as when pictures are drawn.
            false => pieces.push(tokenizer.encode(text)?.ids),
        }
    }
    let batch = |pieces: &[Vec<i64>]| {
        let ids: Vec<i64> = pieces.iter().flatten().copied().collect();
        encoder.embed(&Tensor::f_from_slice(&ids)?.f_view([pieces.len() as i64, -1])?)
    };
    pieces.chunks(TEXTS_TOGETHER).map(batch).collect()
}

/// The file of a run's final latents.
const LATENTS: &str = "latents.json";

/// The unscaled final latents of the dense pipeline's pictures, a batch for each: those that the
/// run of `store` has drawn before, or new ones.
///
/// # Errors
/// If the pipeline cannot run.
pub(super) fn of_pictures(
    network: &PreparedNetwork<'_>,
    decoder: &VaeDecoder,
    store: &mut Workspace,
    progress: &dyn Progress,
) -> Result<Vec<States>> {
    let drawn = match store.kept(LATENTS).and_then(|kept| serde_json::from_slice::<Vec<Kept>>(&kept).ok()) {
        Some(kept) => kept.iter().map(Kept::tensor).collect::<Result<Vec<_>>>()?,
        None => {
            let PreparedNetwork { folder, config, options, nsamples, .. } = network;
            let prompts = Prompts::List(evenly(config.calibration.prompts.load()?, *nsamples));
            let section = CalibrationSection { prompts, ..config.calibration.clone() };
            let drawn = final_latents(folder, &folder.unet_weights()?, &section, options, progress)?;
            let kept = drawn.iter().map(Kept::of).collect::<Result<Vec<_>>>()?;
            let content = serde_json::to_vec(&kept).map_err(|why| Error::Failed(why.to_string()))?;
            store.keep(LATENTS, &content)?;
            drawn
        }
    };
    let device = network.placement().device;
    let states = |latents: &Tensor| {
        let latents = latents.f_to_device(device)?.f_to_kind(Kind::Float)?;
        Ok(States { hidden: decoder.unscale(&latents)?, ids: None })
    };
    drawn.iter().map(states).collect()
}

/// The pictures [1, 3, h, w] in [-1, 1] that `decoder` makes of each of `latents`, for the encoder.
///
/// # Errors
/// If libtorch refuses an operation; [`Error::Stopped`].
pub(super) fn pictures(decoder: &VaeDecoder, latents: &[States], progress: &dyn Progress) -> Result<Vec<States>> {
    let task = Task::begin(progress, "decoding", "pictures", latents.len());
    let picture = |latents: &States| {
        task.go_on()?;
        Ok(States { hidden: decoder.forward(&latents.hidden)?.f_clamp(-1.0, 1.0)?, ids: None })
    };
    latents.iter().map(picture).collect()
}

/// Latents in a file: the bits of their fp32 values, which JSON's decimals would round.
#[derive(serde::Serialize, serde::Deserialize)]
struct Kept {
    shape: Vec<i64>,
    bits: Vec<u32>,
}

impl Kept {
    fn of(latents: &Tensor) -> Result<Self> {
        let flat = latents.f_to_device(Device::Cpu)?.f_to_kind(Kind::Float)?.f_flatten(0, -1)?;
        let values: Vec<f32> = Vec::try_from(&flat)?;
        Ok(Kept { shape: latents.size(), bits: values.into_iter().map(f32::to_bits).collect() })
    }

    fn tensor(&self) -> Result<Tensor> {
        let values: Vec<f32> = self.bits.iter().copied().map(f32::from_bits).collect();
        Ok(Tensor::f_from_slice(&values)?.f_view(self.shape.as_slice())?)
    }
}
