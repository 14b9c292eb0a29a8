//! Outputs that are a folder.

use std::fs::File;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use super::parent::parent;
use super::persist::{share, sync_folder, sync_tree};
use super::{destination, leftovers};
use crate::error::{Error, Result};

/// Checks that the folder `path` exists or can be made.
///
/// # Errors
/// [`Error::Argument`] if an ancestor is not a folder, or a name is too long.
pub fn check_folder(path: &Path) -> Result<()> {
    use std::io::ErrorKind::{InvalidFilename, NotADirectory, NotFound};
    for ancestor in path.ancestors() {
        match std::fs::metadata(ancestor) {
            Ok(found) if found.is_dir() => return Ok(()),
            Ok(found) => {
                let (folder, is) = (path.display(), crate::input::name_of(found.file_type()));
                return Err(Error::Argument(format!("cannot make the folder {folder}: {} is {is}", ancestor.display())));
            }
            // Absent folders can be made; the first existing ancestor decides.
            Err(why) if matches!(why.kind(), NotFound | NotADirectory) => {}
            Err(why) if why.kind() == InvalidFilename => {
                return Err(Error::Argument(format!("cannot make the folder {}: {why}", path.display())));
            }
            Err(why) => return Err(Error::write(path)(why)),
        }
    }
    Ok(())
}

/// A folder that appears whole: filled under a temporary name beside its own, renamed by
/// [`commit`](Self::commit), removed if dropped before. Creating it removes the leftovers of killed
/// runs.
#[derive(Debug)]
pub struct NewFolder {
    temporary: TempDir,
    /// Locked while this run lives, so that no other run takes the folder for a leftover.
    _lock: File,
    path: PathBuf,
}

impl NewFolder {
    /// Begins the folder that will be `path`. A link is followed, and its target will be the
    /// folder.
    ///
    /// # Errors
    /// [`Error::Argument`] if something other than an empty folder is there already;
    /// [`Error::Write`] if its parent cannot be written.
    pub fn create(path: &Path) -> Result<Self> {
        let target = destination::of_folder(path)?;
        let begin = || {
            std::fs::create_dir_all(parent(&target))?;
            leftovers::remove(&target);
            leftovers::new_folder(&target)
        };
        let (temporary, lock) = begin().map_err(Error::write(path))?;
        Ok(NewFolder { temporary, _lock: lock, path: target })
    }

    /// The temporary folder to fill.
    #[must_use]
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::output::check_file;

    #[test]
    fn what_is_in_the_way_of_a_folder_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        std::fs::write(&file, b"").unwrap();
        for (path, words) in
            [(file.clone(), "is a file"), (file.join("a/b"), "is a file"), (folder.path().join("x".repeat(300)), "too long")]
        {
            let refused = check_folder(&path).unwrap_err();
            assert!(refused.is_bad_input() && refused.to_string().contains(words), "{refused}");
        }
        check_folder(&folder.path().join("new/newer")).unwrap();
        check_folder(Path::new("new/newer")).unwrap();
        let refused = check_file(&folder.path().join("x".repeat(300))).unwrap_err();
        assert!(refused.is_bad_input() && refused.to_string().contains("too long"), "{refused}");
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
