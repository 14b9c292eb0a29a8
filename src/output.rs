//! Writes files so that a reader sees the old content or the new, never half of either, and removes
//! the leftovers of killed runs.

mod destination;
mod leftovers;

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use crate::error::{Error, Result};
use destination::Destination;
pub use destination::is_standard_output;

/// Writes `path` through a temporary sibling that is synced and renamed. An existing file is
/// replaced at once, or not at all.
///
/// A link is followed, and its target is written, whether it exists or not. Devices, pipes and open
/// descriptors (`/dev/stdout`, `/dev/fd/3`) cannot be replaced and are written to directly.
/// Leftovers of killed runs beside the file are removed.
///
/// # Errors
/// [`Error::Argument`] if `path` is a folder, a socket or a block device; [`Error::Write`], and
/// then `path` is as it was.
pub fn write_file(path: &Path, content: impl FnOnce(&mut dyn Write) -> std::io::Result<()>) -> Result<()> {
    match Destination::of(path)? {
        Destination::File(target) => replace(&target, content),
        Destination::Stream(mut stream) => stream.write(content),
    }
    .map_err(Error::write(path))
}

/// Checks whether [`write_file`] can write `path`, as far as can be known without writing.
///
/// # Errors
/// [`Error::Argument`] if `path` cannot be written, or its folder does not exist.
pub fn check_file(path: &Path) -> Result<()> {
    let Destination::File(target) = Destination::of(path)? else { return Ok(()) };
    let folder = parent(&target);
    if folder.is_dir() {
        return Ok(());
    }
    Err(Error::Argument(format!("cannot write {}: there is no folder {}", path.display(), folder.display())))
}

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

fn replace(target: &Path, content: impl FnOnce(&mut dyn Write) -> std::io::Result<()>) -> std::io::Result<()> {
    leftovers::remove(target);
    let mut file = leftovers::new_file(target)?;
    let mut buffered = std::io::BufWriter::new(file.as_file_mut());
    content(&mut buffered)?;
    buffered.flush()?;
    drop(buffered);
    match std::fs::metadata(target) {
        // The owner's choice of permissions stays.
        Ok(old) => std::fs::set_permissions(file.path(), old.permissions())?,
        Err(_) => share(file.path())?,
    }
    file.as_file().sync_all()?;
    file.persist(target).map_err(|failed| failed.error)?;
    sync_folder(parent(target))
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

/// Gives a temporary file, which is private, the usual mode.
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

    #[cfg(unix)]
    #[test]
    fn who_may_read_a_file_stays_as_it_was() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let mode = || std::fs::metadata(&path).unwrap().permissions().mode() & 0o777;
        write_file(&path, |out| out.write_all(b"new")).unwrap();
        assert_eq!(mode(), 0o644);
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        write_file(&path, |out| out.write_all(b"newer")).unwrap();
        assert_eq!(mode(), 0o600);
    }

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

    #[cfg(unix)]
    #[test]
    fn links_are_written_through_and_stay() {
        let folder = tempfile::tempdir().unwrap();
        let elsewhere = tempfile::tempdir().unwrap();
        let (link, file) = (folder.path().join("link"), elsewhere.path().join("file"));
        std::os::unix::fs::symlink(&file, &link).unwrap();
        // The first time the link leads nowhere yet.
        for content in [b"new", b"two"] {
            write_file(&link, |out| out.write_all(content)).unwrap();
            assert_eq!(std::fs::read(&file).unwrap(), content);
            assert!(link.is_symlink());
        }
        let (link, model) = (folder.path().join("to-a-folder"), elsewhere.path().join("model"));
        std::os::unix::fs::symlink(&model, &link).unwrap();
        let new = NewFolder::create(&link).unwrap();
        std::fs::write(new.path().join("a"), b"a").unwrap();
        new.commit().unwrap();
        assert!(link.is_symlink() && model.join("a").exists());
        let (link, round) = (folder.path().join("round"), folder.path().join("about"));
        std::os::unix::fs::symlink(&link, &round).unwrap();
        std::os::unix::fs::symlink(&round, &link).unwrap();
        assert!(write_file(&link, |out| out.write_all(b"new")).unwrap_err().to_string().contains("cannot write"));
    }

    #[cfg(unix)]
    #[test]
    fn what_is_no_file_is_written_to_or_refused_but_never_replaced() {
        use std::io::Read;
        use std::os::unix::fs::FileTypeExt;
        let folder = tempfile::tempdir().unwrap();
        let pipe = folder.path().join("pipe");
        assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
        let reader = std::thread::spawn({
            let pipe = pipe.clone();
            move || {
                let mut read = Vec::new();
                File::open(pipe).unwrap().read_to_end(&mut read).unwrap();
                read
            }
        });
        write_file(&pipe, |out| out.write_all(b"through")).unwrap();
        assert_eq!(reader.join().unwrap(), b"through");
        assert!(std::fs::metadata(&pipe).unwrap().file_type().is_fifo());

        write_file(Path::new("/dev/null"), |out| out.write_all(b"gone")).unwrap();
        assert!(std::fs::metadata("/dev/null").unwrap().file_type().is_char_device());

        let socket = folder.path().join("socket");
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        for (path, what) in [(socket.as_path(), "a socket"), (folder.path(), "a folder")] {
            let refused = write_file(path, |_| Ok(())).unwrap_err();
            assert!(refused.is_bad_input() && refused.to_string().contains(what), "{refused}");
            assert!(check_file(path).is_err());
            assert!(NewFolder::create(path).is_err());
        }
        assert!(std::fs::metadata(&socket).unwrap().file_type().is_socket());
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_full_device_is_a_failure_and_an_open_descriptor_is_written_to() {
        use std::os::fd::AsRawFd;
        let failed = write_file(Path::new("/dev/full"), |out| out.write_all(b"x")).unwrap_err();
        assert!(!failed.is_bad_input(), "{failed}");
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        std::fs::write(&path, b"before ").unwrap();
        let open = std::fs::OpenOptions::new().append(true).open(&path).unwrap();
        write_file(Path::new(&format!("/dev/fd/{}", open.as_raw_fd())), |out| out.write_all(b"after")).unwrap();
        // The same file, not another under its name.
        open.sync_all().unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"before after");
        assert_eq!(std::os::unix::fs::MetadataExt::nlink(&open.metadata().unwrap()), 1);
    }
}
