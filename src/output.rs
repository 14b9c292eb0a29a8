//! Writing so that a reader finds the old file or the new one, never half of either.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use tempfile::{NamedTempFile, TempDir};

use crate::error::{Error, Result};

/// Writes `path` through a temporary sibling that is synced and renamed. An existing file is replaced at once, or not at all.
///
/// # Errors
/// [`Error::Write`]; then `path` is as it was.
pub fn write_file(path: &Path, content: impl FnOnce(&mut dyn Write) -> std::io::Result<()>) -> Result<()> {
    let write = || -> std::io::Result<()> {
        let mut file = NamedTempFile::with_prefix_in(".partial-", parent(path))?;
        let mut buffered = std::io::BufWriter::new(file.as_file_mut());
        content(&mut buffered)?;
        buffered.flush()?;
        drop(buffered);
        share(file.path())?;
        file.as_file().sync_all()?;
        file.persist(path).map_err(|failed| failed.error)?;
        sync_folder(parent(path))
    };
    write().map_err(Error::write(path))
}

/// A folder that comes into being whole: filled under a temporary name beside its own, renamed by [`commit`](Self::commit),
/// removed if dropped before.
#[derive(Debug)]
pub struct NewFolder {
    temporary: TempDir,
    path: PathBuf,
}

impl NewFolder {
    /// Begins the folder that will be `path`.
    ///
    /// # Errors
    /// [`Error::Argument`] if something other than an empty folder is there already; [`Error::Write`] if its parent cannot be
    /// written.
    pub fn create(path: &Path) -> Result<Self> {
        let free = match std::fs::read_dir(path) {
            Ok(mut entries) => entries.next().is_none(),
            Err(why) => why.kind() == std::io::ErrorKind::NotFound,
        };
        if !free {
            return Err(Error::Argument(format!("{} is there already; name a new folder", path.display())));
        }
        std::fs::create_dir_all(parent(path)).map_err(Error::write(path))?;
        let temporary = TempDir::with_prefix_in(".partial-", parent(path)).map_err(Error::write(path))?;
        Ok(NewFolder { temporary, path: path.to_owned() })
    }

    /// Where to put the files until then.
    pub fn path(&self) -> &Path {
        self.temporary.path()
    }

    /// Syncs every file and gives the folder its name.
    ///
    /// # Errors
    /// [`Error::Write`]; then nothing is left.
    pub fn commit(self) -> Result<()> {
        let finish = || -> std::io::Result<()> {
            sync_tree(self.temporary.path())?;
            share(self.temporary.path())?;
            // rename(2) replaces an empty folder, and only an empty one.
            std::fs::rename(self.temporary.path(), &self.path)?;
            sync_folder(parent(&self.path))
        };
        finish().map_err(Error::write(&self.path))
    }
}

/// The folder that `path` is in.
pub(crate) fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Temporary files are made private; what is delivered has the usual modes.
fn share(path: &Path) -> std::io::Result<()> {
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        let mode = if path.is_dir() { 0o755 } else { 0o644 };
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))?;
    }
    Ok(())
}

/// Makes a rename in `folder` survive a power cut.
fn sync_folder(folder: &Path) -> std::io::Result<()> {
    if cfg!(unix) { File::open(folder)?.sync_all() } else { Ok(()) }
}

fn sync_tree(folder: &Path) -> std::io::Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        share(&path)?;
        if path.is_dir() { sync_tree(&path)? } else { File::open(&path)?.sync_all()? }
    }
    sync_folder(folder)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_write_leaves_the_old_file_and_no_litter() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        write_file(&path, |out| out.write_all(b"old")).unwrap();
        let failed = write_file(&path, |out| {
            out.write_all(b"new")?;
            Err(std::io::Error::other("full"))
        });
        assert!(failed.is_err());
        assert_eq!(std::fs::read(&path).unwrap(), b"old");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_folder_appears_whole_or_not_at_all() {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("model");
        let folder = NewFolder::create(&path).unwrap();
        std::fs::write(folder.path().join("a"), b"a").unwrap();
        drop(folder);
        assert_eq!(std::fs::read_dir(parent.path()).unwrap().count(), 0);

        let folder = NewFolder::create(&path).unwrap();
        std::fs::write(folder.path().join("a"), b"a").unwrap();
        assert!(!path.exists());
        folder.commit().unwrap();
        assert_eq!(std::fs::read(path.join("a")).unwrap(), b"a");
        assert!(NewFolder::create(&path).unwrap_err().is_bad_input());
    }
}
