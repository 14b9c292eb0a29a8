//! Tuning as a part of a run: what is learned, the stored network, the state on the disk.

use sdxl_model::checkpoint::{SafetensorsFile, TensorSource};
use sdxl_model::unet::Unet;
use squeeze_base::error::{Error, Result};
use squeeze_base::progress::{Progress, Task};
use squeeze_numerics::device::Placement;
use tch::{Device, Kind, Tensor};

use super::identity::Inputs;
use super::kept;
use super::prepare::Prepared;
use super::workspace::Workspace;
use crate::calibration::{PromptSet, calibrate, settings};
use crate::config::{CalibrationSection, Prompts, TuneSection};
use crate::plan::joined;
use crate::tune::{Lesson, State, Trained, Training, held_out, timestep_weights, tune};

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
    source: &dyn TensorSource,
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
    let lessons = lessons(prepared, section, &calibration, &set, progress)?;
    inputs.check_prompt_files(folder)?;
    let Placement { device, kind } = options.placement();
    // On a CPU gradients of fp16 and bf16 are slow, or are not there at all.
    let placement = Placement { device, kind: if device == Device::Cpu { Kind::Float } else { kind } };
    let state = newest_state(workspace);
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
    let workspace = &*workspace;
    let stored = Stored { workspace, source };
    let weight = |name: &str| stored.weight(name);
    let mut slot = state.as_ref().map_or(0, |(newest, _)| 1 - newest);
    let mut keep = |bytes: &[u8]| {
        let name = STATES[slot];
        slot = 1 - slot;
        workspace.keep(name, bytes)
    };
    tune(&training, &weight, &stored, placement, state.map(|(_, state)| state), &mut keep, progress)
}

/// The calls of `set`, with the dense predictions.
fn lessons(
    prepared: &Prepared<'_>,
    section: &TuneSection,
    calibration: &CalibrationSection,
    set: &PromptSet,
    progress: &dyn Progress,
) -> Result<Vec<Lesson>> {
    let Prepared { folder, options, weights, .. } = prepared;
    let held_out = held_out(set.prompts.len(), set.calls()?, section.nsamples)?;
    let scheduler = set.scheduler.scheduler(set.steps)?;
    let mut timesteps = scheduler.timesteps().to_vec();
    // Some samplers call the UNet twice at a timestep.
    timesteps.dedup();
    let weight_of = timestep_weights(&timesteps, &set.scheduler, section.timestep_weighting)?;
    let samples = calibrate(folder, weights, calibration, options, progress)?;
    if samples.calls.len() != held_out.len() {
        return Err(Error::internal("there are other calls than were spread over the prompts"));
    }
    let placement = options.placement();
    let elements: u64 = folder.unet.tensors()?.iter().map(|tensor| tensor.numel()).sum();
    let source = weights.narrow_source(placement);
    let is_resident = elements * placement.kind.elt_size_in_bytes() as u64 <= options.memory_budget()?.saturating_sub(1 << 30);
    let unet = match is_resident {
        true => Unet::resident(folder.unet.clone(), weights.source(placement), progress)?,
        false => Unet::one_at_a_time(folder.unet.clone(), source)?,
    };
    let task = Task::begin(progress, "dense predictions", "calls", samples.calls.len());
    let lesson = |(call, held_out): (crate::calibration::Sample, bool)| {
        task.go_on()?;
        task.advance(&format!("timestep {:.0}", call.timestep));
        let target = unet.predict(&call.sample, call.timestep, &call.conditioning)?;
        let index = timesteps.iter().position(|timestep| *timestep == call.timestep);
        let weight = index.map(|index| weight_of[index]).ok_or_else(|| Error::internal("a call is at none of the timesteps"))?;
        Ok(Lesson { call, target, weight, held_out })
    };
    samples.calls.into_iter().zip(held_out).map(lesson).collect()
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
    source: &'a dyn TensorSource,
}

impl Stored<'_> {
    /// The compressed weight `name`; `None` for a tensor that is not compressed.
    fn weight(&self, name: &str) -> Result<Option<squeeze_container::CompressedWeight>> {
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
