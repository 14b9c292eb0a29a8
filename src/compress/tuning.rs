//! Tuning as a part of a run, with its state on the disk.

use sdxl_model::checkpoint::{SafetensorsFile, TensorSource};
use squeeze_base::error::{Error, Result};
use squeeze_base::progress::Progress;
use squeeze_numerics::device::Placement;
use tch::{Device, Kind};

use super::identity::Inputs;
use super::kept;
use super::lessons::{drawing, teach};
use super::prepare::Prepared;
use super::stored::Stored;
use super::workspace::Workspace;
use crate::calibration::{PromptSet, settings};
use crate::config::{CalibrationSection, Prompts, TuneSection};
use crate::tune::{Judge, Split, State, Trained, Training, split, tune};

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
    let Prepared { options, config, .. } = prepared;
    let folder = prepared.folder()?;
    let state = newest_state(workspace);
    let workspace = &*workspace;
    let stored = Stored { workspace, source };
    let Split { learned, held_out } = split(&inputs.tuning_prompts)?;
    let calibration = CalibrationSection {
        prompts: Prompts::List(learned.clone()),
        samples: None,
        // One sampler, whose steps are weighed.
        mix: config.calibration.mix.iter().take(1).copied().collect(),
        calibration_nsamples: section.nsamples,
        ..config.calibration.clone()
    };
    let set = PromptSet { prompts: learned, ..settings(folder, &calibration)? };
    let taught = teach(prepared, section, &calibration, &set, &held_out, &stored, progress)?;
    inputs.check_prompt_files(folder)?;
    let Placement { device, kind } = options.placement();
    // On a CPU gradients of fp16 and bf16 are slow, or are not there at all.
    let placement = Placement { device, kind: if device == Device::Cpu { Kind::Float } else { kind } };
    let judge = Judge { drawing: drawing(prepared, &set, &taught.probes)?, probes: taught.probes, dense: taught.dense };
    let training = Training {
        chain: &folder.unet,
        lessons: &taught.lessons,
        judge: &judge,
        guidance: set.guidance,
        section,
        joined: judge.drawing.joined,
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
