//! What tuning learns and is judged by, made by the dense network.

use std::ffi::c_void;

use sdxl_model::checkpoint::TensorSource;
use sdxl_model::unet::{Conditioning, Unet};
use squeeze_base::error::{Error, Result};
use squeeze_base::progress::{Progress, Task};
use squeeze_numerics::device::Placement;
use tch::{Device, Tensor};

use super::prepare::Prepared;
use super::stored::{Placed, Stored};
use crate::calibration::{PicturesInTurn, PromptSet, Sample, calibrate};
use crate::config::{CalibrationSection, TuneSection, TuneWeighting};
use crate::plan::{PROBES, joined};
use crate::tune::{Drawing, Lesson, Probe, Weight, effects};

/// The share of the error in which all calls count alike.
const SHARE: f64 = 0.8;

/// What is learned, and the held-out pictures with the dense network's final latents.
pub(super) struct Taught {
    pub lessons: Vec<Lesson>,
    pub probes: Vec<Probe>,
    pub dense: Vec<Tensor>,
}

/// Draws the prompts of `set`, which are those of `calibration`, and the `held_out` ones.
///
/// # Errors
/// If prompts cannot be encoded or drawn.
pub(super) fn teach(
    prepared: &Prepared<'_>,
    section: &TuneSection,
    calibration: &CalibrationSection,
    set: &PromptSet,
    held_out: &[(usize, String)],
    stored: &Stored<'_>,
    progress: &dyn Progress,
) -> Result<Taught> {
    let Prepared { options, weights, .. } = prepared;
    let folder = prepared.folder()?;
    let samples = calibrate(folder, weights, calibration, options, progress)?;
    let placement = options.placement();
    let encoder = set.encoder(folder, placement)?;
    let pictures = PicturesInTurn::load(folder, set.size, placement)?;
    let probe = |index: usize, prompt: &str| -> Result<Probe> {
        let (guidance, seed) = (set.guidance_of(prompt, folder, &encoder)?, set.seed.wrapping_add(index as u64));
        // Of a model that takes a picture, a grey one.
        let guidance = match &pictures {
            Some(pictures) => pictures.show(&guidance, index, seed)?,
            None => guidance,
        };
        Ok(Probe { guidance, seed })
    };
    let probes = held_out.iter().map(|(index, prompt)| probe(*index, prompt)).collect::<Result<Vec<_>>>()?;
    // Spread over the prompts, whose order may have a meaning.
    let measured = (0..PROBES).map(|number| (2 * number + 1) * set.prompts.len() / (2 * PROBES));
    let measured = measured.map(|index| probe(index, &set.prompts[index])).collect::<Result<Vec<_>>>()?;
    drop(encoder);
    let drawing = drawing(prepared, set, &probes)?;
    let source = weights.source(placement);
    let dense = unet(prepared, &source, progress)?;
    let weights = match section.timestep_weighting {
        TuneWeighting::Uniform => None,
        TuneWeighting::Effect => {
            let source = Placed { stored, placement };
            let compressed = unet(prepared, &source, progress)?;
            let task = Task::begin(progress, "effects of errors", "calls", measured.len() * set.calls()?);
            Some(effects((&dense, &compressed), drawing, &measured, &task)?.weights(SHARE))
        }
    };
    let lessons = lessons(&samples.calls, &dense, weights.as_deref(), progress)?;
    let task = Task::begin(progress, "held-out pictures", "calls", probes.len().div_ceil(drawing.joined) * set.calls()?);
    let predict = |inputs: &[Tensor], timestep: f64, conditionings: &[&Conditioning]| -> Result<Vec<Tensor>> {
        let each = inputs.iter().zip(conditionings);
        each.map(|(input, conditioning)| dense.predict(input, timestep, conditioning)).collect()
    };
    let on_call = |timestep: f64| {
        task.go_on()?;
        task.advance(&format!("timestep {timestep:.0}"));
        Ok(())
    };
    let latents = drawing.latents(&probes, &predict, &on_call)?;
    Ok(Taught { lessons, probes, dense: latents })
}

/// How pictures of `set` are drawn.
///
/// # Errors
/// [`Error::Argument`] for a UNet alone.
pub(super) fn drawing<'a>(prepared: &Prepared<'_>, set: &'a PromptSet, probes: &[Probe]) -> Result<Drawing<'a>> {
    let (folder, options) = (prepared.folder()?, &prepared.options);
    let scale = folder.vae.scale();
    let shape = [1, folder.vae.latent_channels, set.size.0 / scale, set.size.1 / scale];
    let rows = probes.first().map_or(1, |probe| probe.guidance.conditioning.encoder_hidden_states.size()[0]);
    let first = rows * folder.unet.first_carry(shape[2], shape[3]).numel();
    Ok(Drawing { scheduler: &set.scheduler, steps: set.steps, shape, joined: joined(first, options.placement().device) })
}

/// The calls with the dense predictions. All count alike where there are no `weights`.
fn lessons(calls: &[Sample], dense: &Unet<'_>, weights: Option<&[Weight]>, progress: &dyn Progress) -> Result<Vec<Lesson>> {
    let task = Task::begin(progress, "dense predictions", "calls", calls.len());
    let mut shared: Option<(*mut c_void, Conditioning)> = None;
    let lesson = |call: &Sample| {
        task.go_on()?;
        task.advance(&format!("timestep {:.0}", call.timestep));
        let target = dense.predict(&call.sample, call.timestep, &call.conditioning)?.f_to_device(Device::Cpu)?;
        let weight = match weights {
            None => Weight { timestep: call.timestep, weight: 1.0, error: 1.0 },
            Some(weights) => {
                let found = weights.iter().find(|weight| weight.timestep == call.timestep);
                *found.ok_or_else(|| Error::internal("a call is at none of the sampler's timesteps"))?
            }
        };
        // They wait in the host's memory, in the dtype that they have. Neighbours of one prompt
        // share their conditioning, which is much larger than the latents.
        let texts = call.conditioning.encoder_hidden_states.data_ptr();
        let mut here = call.placed(Placement { device: Device::Cpu, kind: call.sample.f_kind()? })?;
        match &shared {
            Some((same, conditioning)) if *same == texts => here.conditioning = conditioning.shallow_clone(),
            Some(_) | None => shared = Some((texts, here.conditioning.shallow_clone())),
        }
        Ok(Lesson { call: here, target, weight: weight.weight, expected: weight.error })
    };
    calls.iter().map(lesson).collect()
}

/// A UNet with weights of `source`, in memory if two of them fit.
fn unet<'a>(prepared: &Prepared<'_>, source: &'a (dyn TensorSource + Sync), progress: &dyn Progress) -> Result<Unet<'a>> {
    let (chain, options) = (prepared.unet.chain(), &prepared.options);
    let elements: u64 = chain.tensors()?.iter().map(|tensor| tensor.numel()).sum();
    let bytes = elements * options.kind.elt_size_in_bytes() as u64;
    match 2 * bytes <= options.memory_budget()?.saturating_sub(1 << 30) {
        true => Unet::resident(chain.clone(), source, progress),
        false => Unet::one_at_a_time(chain.clone(), source),
    }
}
