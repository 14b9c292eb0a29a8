//! The calibration samples of a run, kept in its workspace so that a continued run need not draw
//! them again.

use sdxl_model::checkpoint::{SafetensorsFile, Weights};
use sdxl_pipeline::PipelineFolder;
use squeeze_base::error::{Error, Result};
use squeeze_base::progress::Progress;

use super::kept;
use super::workspace::Workspace;
use crate::calibration::{Samples, calibrate};
use crate::config::CalibrationSection;
use crate::recipe::RunOptions;

const SAMPLES: &str = "samples.safetensors";
const NOTES: &str = "samples.json";

/// The samples of `workspace`, drawn anew if they are absent or damaged.
pub(super) fn kept_samples(
    folder: &PipelineFolder,
    weights: &Weights,
    section: &CalibrationSection,
    options: &RunOptions,
    workspace: &mut Workspace,
    progress: &dyn Progress,
) -> Result<Samples> {
    if let Some(notes) = workspace.kept(NOTES)
        && kept::has_seal(workspace.folder(), SAMPLES)
    {
        match read(folder, workspace, &notes) {
            Ok(samples) => return Ok(samples),
            Err(why) => workspace.warn(format!("{why}: the samples are made again")),
        }
    }
    let samples = calibrate(folder, weights, section, options, progress)?;
    keep(&samples, workspace)?;
    Ok(samples)
}

/// Keeps samples in `workspace`.
pub(super) fn keep(samples: &Samples, workspace: &Workspace) -> Result<()> {
    let notes = serde_json::to_vec(&samples.notes).map_err(|why| Error::Failed(why.to_string()))?;
    workspace.keep(NOTES, &notes)?;
    workspace.keep(SAMPLES, &samples.to_bytes()?)
}

fn read(folder: &PipelineFolder, workspace: &Workspace, notes: &[u8]) -> Result<Samples> {
    let path = workspace.folder().join(SAMPLES);
    let file = SafetensorsFile::open(&path)?;
    if !kept::fits(workspace.folder(), workspace.run(), SAMPLES, &file.sha256()?) {
        return Err(Error::bad_file(&path, "is damaged"));
    }
    // Every sample of the file is wanted, so reading has no notes of its own; recording may have
    // had.
    let mut samples = Samples::from_file(&file, folder.unet.config(), usize::MAX)?;
    samples.notes = serde_json::from_slice(notes).map_err(|source| Error::Json { path: NOTES.into(), source })?;
    Ok(samples)
}
