//! The disk space of a run, and whether it fits.

use std::path::Path;

use sdxl_model::unet::UnetConfig;
use serde::Serialize;
use squeeze_base::error::{Error, Result};
use squeeze_base::number;

use crate::calibration::Calls;

/// Bytes on the disk: those of a run under way, and those of its result.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Disk {
    /// Calibration samples, kept so that a run can be resumed; 0 if the run is given its samples or
    /// reads them from a file.
    pub samples: u64,
    /// Carries between the stages at their largest, including those of the dense network; 0 if they
    /// wait in memory.
    pub carries: u64,
    /// Carries that are left when the result is written.
    pub carries_left: u64,
    /// Finished layers.
    pub parts: u64,
    /// The container.
    pub result: u64,
}

impl Disk {
    /// The most bytes at once. A container is assembled beside its place and then written to it, so
    /// for a moment it exists twice.
    #[must_use]
    pub fn peak(&self) -> u64 {
        let Disk { samples, carries, carries_left, parts, result } = self;
        samples + parts + (*carries).max(carries_left + 2 * result)
    }

    /// The disk space if the run keeps no samples.
    #[must_use]
    pub fn without_samples(self) -> Self {
        Disk { samples: 0, ..self }
    }

    /// A sentence of the sizes.
    #[must_use]
    pub fn text(&self) -> String {
        let Disk { samples, carries, parts, result, .. } = self;
        let size = number::size;
        format!(
            "{} on the disk: {} of samples, {} of carries, {} of finished layers, {} of result",
            size(self.peak()),
            size(*samples),
            size(*carries),
            size(*parts),
            size(*result)
        )
    }
}

/// Bytes of calibration samples in their file, by shape: fp32.
pub(crate) fn of_samples(calls: &Calls, config: &UnetConfig) -> u64 {
    let latents = config.in_channels * calls.height * calls.width;
    // Pooled text and time ids are smaller than their embeddings, which bound them here.
    let conditioning = calls.text * config.cross_attention_dim + config.projection_class_embeddings_input_dim;
    calls.count as u64 * (calls.batch * (latents + conditioning)).unsigned_abs() * 4
}

/// Checks that `needed` bytes fit on the file system of `folder`, which need not exist yet. A run
/// that is continued has `there` bytes of them already. `what` names the content in the error.
///
/// # Errors
/// [`Error::Argument`] with the numbers.
pub(crate) fn check(folder: &Path, needed: u64, there: u64, what: &str) -> Result<()> {
    let Some(free) = free(folder) else { return Ok(()) };
    let room = free.saturating_add(there);
    if needed <= room {
        return Ok(());
    }
    Err(Error::Argument(format!("{} has {} free, which is too little for {what}", folder.display(), number::size(room))))
}

/// Free bytes on the file system of `folder` for this user; `None` if unknown.
#[cfg(unix)]
#[must_use]
pub fn free(folder: &Path) -> Option<u64> {
    let existing = folder.ancestors().find(|ancestor| ancestor.is_dir()).unwrap_or(Path::new("."));
    let existing = if existing.as_os_str().is_empty() { Path::new(".") } else { existing };
    let status = rustix::fs::statvfs(existing).ok()?;
    // File systems without a size of their own report no blocks at all.
    (status.f_blocks > 0).then(|| status.f_bavail.saturating_mul(status.f_frsize))
}

/// Free bytes on the file system of `folder`: not known on this system.
#[cfg(not(unix))]
#[must_use]
pub fn free(_folder: &Path) -> Option<u64> {
    None
}

/// Bytes of all files in a folder, at any depth; 0 where there is no such folder.
pub(crate) fn taken(folder: &Path) -> u64 {
    let Ok(entries) = std::fs::read_dir(folder) else { return 0 };
    let size = |entry: std::fs::DirEntry| match entry.metadata() {
        Ok(metadata) if metadata.is_dir() => taken(&entry.path()),
        Ok(metadata) => metadata.len(),
        Err(_) => 0,
    };
    entries.flatten().map(size).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_fit_is_refused_with_numbers() {
        let folder = tempfile::tempdir().unwrap();
        let new = folder.path().join("new/deep");
        check(&new, 1 << 10, 0, "a KiB").unwrap();
        let refused = check(&new, u64::MAX, 0, "everything").unwrap_err();
        assert!(refused.is_bad_input() && refused.to_string().contains("free, which is too little for everything"), "{refused}");
        check(&new, 1 << 60, 1 << 60, "what is there").unwrap();
        std::fs::create_dir_all(&new).unwrap();
        std::fs::write(new.join("file"), [0; 1000]).unwrap();
        assert_eq!(taken(folder.path()), 1000);
        assert_eq!(taken(&folder.path().join("absent")), 0);
    }

    #[test]
    fn the_most_at_once() {
        let disk = Disk { samples: 1, carries: 100, carries_left: 10, parts: 20, result: 30 };
        assert_eq!(disk.peak(), 121);
        assert_eq!(Disk { result: 60, ..disk }.without_samples().peak(), 150);
    }
}
