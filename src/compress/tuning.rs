//! Tuning as a part of a run: what is learned, the stored network, the state on the disk.

use sdxl_model::checkpoint::{SafetensorsFile, TensorSource};
use sdxl_model::unet::{Conditioning, Unet};
use squeeze_base::error::{Error, Result};
use squeeze_base::progress::{Progress, Task};
use squeeze_container::CompressedWeight;
use squeeze_numerics::device::Placement;
use tch::{Device, Kind, Tensor};

use super::identity::Inputs;
use super::kept;
use super::prepare::Prepared;
use super::workspace::Workspace;
use crate::calibration::{PicturesInTurn, PromptSet, Sample, calibrate, settings};
use crate::config::{CalibrationSection, Prompts, TuneSection, TuneWeighting};
use crate::plan::{PROBES, joined};
use crate::tune::{Effects, Lesson, Probe, State, Trained, Training, effects, held_out, tune};

/// The two files that states are written to in turn, so that one of them is whole whenever a run is
/// killed.
const STATES: [&str; 2] = ["tuning-0.safetensors", "tuning-1.safetensors"];

/// Tunes the layers of `workspace` by `section`; `source` has the dense weights.
///
/// # Errors
/// If prompts cannot be drawn, a prediction is not finite, a state cannot be written, or the memory
/// is too little; [`Error::Stopped`].
pub(super) fn tune_layers(
    prepared: &Prepared<'_>,
    section: &TuneSection,
    inputs: &Inputs,
    source: &(dyn TensorSource + Sync),
    workspace: &mut Workspace,
    progress: &dyn Progress,
) -> Result<Trained> {
    let Prepared { folder, options, config, .. } = prepared;
    let calibration = CalibrationSection {
        prompts: Prompts::List(inputs.tuning_prompts.clone()),
        samples: None,
        calibration_nsamples: section.nsamples,
        ..config.calibration.clone()
    };
    let set = PromptSet { prompts: inputs.tuning_prompts.clone(), ..settings(folder, &calibration)? };
    let state = newest_state(workspace);
    let workspace = &*workspace;
    let stored = Stored { workspace, source };
    let lessons = lessons(prepared, section, &calibration, &set, &stored, progress)?;
    inputs.check_prompt_files(folder)?;
    let Placement { device, kind } = options.placement();
    // On a CPU gradients of fp16 and bf16 are slow, or are not there at all.
    let placement = Placement { device, kind: if device == Device::Cpu { Kind::Float } else { kind } };
    let first = lessons.first().map_or(1, |lesson| {
        let size = lesson.call.sample.size();
        size[0] * folder.unet.first_carry(size[2], size[3]).numel()
    });
    let training = Training {
        chain: &folder.unet,
        lessons: &lessons,
        guidance: set.guidance,
        section,
        joined: joined(first, device),
        seed: calibration.seed,
    };
    let weight = |name: &str| stored.weight(name);
    let mut slot = state.as_ref().map_or(0, |(newest, _)| 1 - newest);
    let mut keep = |bytes: &[u8]| {
        let name = STATES[slot];
        slot = 1 - slot;
        workspace.keep(name, bytes)
    };
    tune(&training, &weight, &stored, placement, state.map(|(_, state)| state), &mut keep, progress)
}

/// The share of the error in which all calls count alike.
const SHARE: f64 = 0.3;

/// The calls of `set`, with the dense predictions.
fn lessons(
    prepared: &Prepared<'_>,
    section: &TuneSection,
    calibration: &CalibrationSection,
    set: &PromptSet,
    stored: &Stored<'_>,
    progress: &dyn Progress,
) -> Result<Vec<Lesson>> {
    let Prepared { folder, options, weights, .. } = prepared;
    let held_out = held_out(set.prompts.len(), set.calls()?, section.nsamples)?;
    let samples = calibrate(folder, weights, calibration, options, progress)?;
    if samples.calls.len() != held_out.len() {
        return Err(Error::internal("there are other calls than were spread over the prompts"));
    }
    let source = weights.source(options.placement());
    let dense = unet(prepared, &source, progress)?;
    let weight_of = match section.timestep_weighting {
        TuneWeighting::Uniform => Vec::new(),
        TuneWeighting::Effect => measured(prepared, set, &dense, stored, progress)?.weights(SHARE),
    };
    let task = Task::begin(progress, "dense predictions", "calls", samples.calls.len());
    let mut shared: Option<(*mut std::ffi::c_void, Conditioning)> = None;
    let lesson = |(call, held_out): (&Sample, bool)| {
        task.go_on()?;
        task.advance(&format!("timestep {:.0}", call.timestep));
        let target = dense.predict(&call.sample, call.timestep, &call.conditioning)?.f_to_device(Device::Cpu)?;
        let weight = match section.timestep_weighting {
            TuneWeighting::Uniform => 1.0,
            TuneWeighting::Effect => {
                let found = weight_of.iter().find(|(timestep, _)| *timestep == call.timestep);
                found.ok_or_else(|| Error::internal("a call is at none of the sampler's timesteps"))?.1
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
        Ok(Lesson { call: here, target, weight, held_out })
    };
    samples.calls.iter().zip(held_out).map(lesson).collect()
}

/// The effects of the errors of the stored network.
fn measured(
    prepared: &Prepared<'_>,
    set: &PromptSet,
    dense: &Unet<'_>,
    stored: &Stored<'_>,
    progress: &dyn Progress,
) -> Result<Effects> {
    let Prepared { folder, options, .. } = prepared;
    let placement = options.placement();
    let source = Placed { stored, placement };
    let compressed = unet(prepared, &source, progress)?;
    let scale = folder.vae.scale();
    let shape = [1, folder.vae.latent_channels, set.size.0 / scale, set.size.1 / scale];
    // Spread over the prompts, whose order may have a meaning.
    let chosen: Vec<usize> = (0..PROBES).map(|probe| (2 * probe + 1) * set.prompts.len() / (2 * PROBES)).collect();
    let encoder = set.encoder(folder, placement)?;
    let pictures = PicturesInTurn::load(folder, set.size, placement)?;
    let probe = |index: usize| {
        let (guidance, seed) = (set.guidance_of(&set.prompts[index], folder, &encoder)?, set.seed.wrapping_add(index as u64));
        // Of a model that takes a picture, a grey one.
        let guidance = match &pictures {
            Some(pictures) => pictures.show(&guidance, index, seed)?,
            None => guidance,
        };
        Ok(Probe { guidance, seed })
    };
    let probes = chosen.into_iter().map(probe).collect::<Result<Vec<_>>>()?;
    drop(encoder);
    let calls = set.calls()?;
    let rows = probes.first().map_or(1, |probe| probe.guidance.conditioning.encoder_hidden_states.size()[0]);
    let joined = joined(rows * folder.unet.first_carry(shape[2], shape[3]).numel(), placement.device);
    let task = Task::begin(progress, "effects of errors", "calls", probes.len() * calls);
    effects((dense, &compressed), (&set.scheduler, set.steps), &probes, &shape, joined, &task)
}

/// A UNet with weights of `source`, in memory if two of them fit.
fn unet<'a>(prepared: &Prepared<'_>, source: &'a (dyn TensorSource + Sync), progress: &dyn Progress) -> Result<Unet<'a>> {
    let Prepared { folder, options, .. } = prepared;
    let elements: u64 = folder.unet.tensors()?.iter().map(|tensor| tensor.numel()).sum();
    let bytes = elements * options.kind.elt_size_in_bytes() as u64;
    match 2 * bytes <= options.memory_budget()?.saturating_sub(1 << 30) {
        true => Unet::resident(folder.unet.clone(), source, progress),
        false => Unet::one_at_a_time(folder.unet.clone(), source),
    }
}

/// The newest whole state, and the number of its file.
fn newest_state(workspace: &mut Workspace) -> Option<(usize, State)> {
    let mut states = Vec::new();
    for (slot, name) in STATES.into_iter().enumerate() {
        if !kept::has_seal(workspace.folder(), name) {
            continue;
        }
        let read = || -> Result<State> {
            let file = SafetensorsFile::open(&workspace.folder().join(name))?;
            if !kept::fits(workspace.folder(), workspace.run(), name, &file.sha256()?) {
                return Err(Error::bad_file(file.path(), "is damaged"));
            }
            State::read(&file)
        };
        match read() {
            Ok(state) => states.push((slot, state)),
            Err(why) => workspace.warn(format!("{why}: an older state of the tuning is gone on with")),
        }
    }
    states.into_iter().max_by_key(|(_, state)| state.log.steps)
}

/// The network as it is stored before it is tuned.
struct Stored<'a> {
    workspace: &'a Workspace,
    source: &'a (dyn TensorSource + Sync),
}

impl Stored<'_> {
    /// The compressed weight `name`; `None` for a tensor that is not compressed.
    fn weight(&self, name: &str) -> Result<Option<CompressedWeight>> {
        match name.strip_suffix(".weight") {
            Some(layer) if self.workspace.has(layer) => self.workspace.weight(layer),
            Some(_) | None => Ok(None),
        }
    }
}

impl TensorSource for Stored<'_> {
    fn tensor(&self, name: &str, shape: &[i64]) -> Result<Tensor> {
        match self.weight(name)? {
            Some(weight) => Ok(Tensor::f_from_slice(&weight.decode()?)?.f_view(shape)?),
            None => self.source.tensor(name, shape),
        }
    }
}

/// The stored network in the place and dtype in which it runs.
struct Placed<'a, 'b> {
    stored: &'a Stored<'b>,
    placement: Placement,
}

impl TensorSource for Placed<'_, '_> {
    fn tensor(&self, name: &str, shape: &[i64]) -> Result<Tensor> {
        Ok(self.stored.tensor(name, shape)?.f_to_device(self.placement.device)?.f_to_kind(self.placement.kind)?)
    }
}
