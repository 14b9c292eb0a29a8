//! Outputs that are one file.

use std::io::Write;
use std::path::Path;

use super::destination::Destination;
use super::leftovers;
use super::parent::parent;
use super::persist::{share, sync_folder};
use crate::error::{Error, Result};

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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::output::NewFolder;

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
                std::fs::File::open(pipe).unwrap().read_to_end(&mut read).unwrap();
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
