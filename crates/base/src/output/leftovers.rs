//! Temporary siblings of an output, and the removal of those that killed runs left.
//!
//! The sibling of `NAME` is `.NAME.partial-XXXXXX`, and locked while its run lives. The system
//! takes the lock away when a process ends, however it ends: so a sibling that can be locked
//! belongs to nobody any more.

use std::ffi::{OsStr, OsString};
use std::fs::{File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};

use tempfile::{Builder, NamedTempFile, TempDir};

use super::parent::parent;

/// Characters after the prefix.
const RANDOM: usize = 6;
/// The longest name of a file.
const LONGEST: usize = 255;
/// Another run may take a sibling for a leftover between its making and its locking; then another
/// is made. More often than this that is no accident.
const ATTEMPTS: usize = 100;

/// Makes a temporary sibling of the file `target` and locks it.
pub(super) fn new_file(target: &Path) -> io::Result<NamedTempFile> {
    attempts(|| {
        let file = Builder::new().prefix(&prefix(target)).rand_bytes(RANDOM).tempfile_in(parent(target))?;
        Ok(is_ours(file.as_file(), file.path())?.then_some(file))
    })
}

/// Makes a temporary sibling of the folder `target`, and the lock that marks it as in use.
pub(super) fn new_folder(target: &Path) -> io::Result<(TempDir, File)> {
    attempts(|| {
        let folder = Builder::new().prefix(&prefix(target)).rand_bytes(RANDOM).tempdir_in(parent(target))?;
        // Where another run has removed it already, there is nothing to open.
        let Ok(lock) = options().open(folder.path()) else { return Ok(None) };
        Ok(is_ours(&lock, folder.path())?.then_some((folder, lock)))
    })
}

/// Removes the siblings of `target` whose runs have ended. A sibling that cannot be removed stays;
/// it does no harm.
pub(super) fn remove(target: &Path) {
    let prefix = prefix(target);
    let Ok(entries) = std::fs::read_dir(parent(target)) else { return };
    for entry in entries.flatten().filter(|entry| is_sibling(&entry.file_name(), &prefix)) {
        let path = entry.path();
        match remove_if_dead(&path) {
            Ok(true) => tracing::info!("removed {}, which an ended run left", path.display()),
            Ok(false) => {}
            Err(why) => tracing::info!("{}: cannot be removed: {why}", path.display()),
        }
    }
}

fn attempts<T>(make: impl Fn() -> io::Result<Option<T>>) -> io::Result<T> {
    for _ in 0..ATTEMPTS {
        if let Some(made) = make()? {
            return Ok(made);
        }
    }
    Err(io::Error::other("temporary files are removed as soon as they are made"))
}

/// Locks a new sibling, unless another run was first.
fn is_ours(opened: &File, path: &Path) -> io::Result<bool> {
    match opened.try_lock() {
        Ok(()) => is_at(opened, path),
        Err(std::fs::TryLockError::WouldBlock) => Ok(false),
        // On a file system without locks no other run can lock the sibling either, so none removes
        // it.
        Err(std::fs::TryLockError::Error(_)) => Ok(true),
    }
}

/// Removes a sibling if no run holds its lock.
fn remove_if_dead(path: &Path) -> io::Result<bool> {
    // Links and pipes with such a name are not opened.
    let kind = std::fs::symlink_metadata(path)?.file_type();
    if !kind.is_file() && !kind.is_dir() {
        return Ok(false);
    }
    let opened = options().open(path)?;
    // It is removed with its lock held, so that a run which has only just made it sees that it is
    // gone.
    if opened.try_lock().is_err() || !is_at(&opened, path)? {
        return Ok(false);
    }
    if kind.is_dir() {
        std::fs::remove_dir_all(path)?
    } else {
        std::fs::remove_file(path)?
    }
    Ok(true)
}

/// How a sibling is opened to be locked, be it a file or a folder: no link is followed, and no pipe
/// is waited for.
fn options() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.read(true);
    #[cfg(unix)]
    {
        use std::os::unix::fs::OpenOptionsExt;
        options.custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK);
    }
    #[cfg(windows)]
    {
        use std::os::windows::fs::OpenOptionsExt;
        /// Without this flag of `CreateFile` Windows opens no folders.
        const FILE_FLAG_BACKUP_SEMANTICS: u32 = 0x0200_0000;
        options.custom_flags(FILE_FLAG_BACKUP_SEMANTICS);
    }
    options
}

/// Whether `path` still names the opened file.
fn is_at(opened: &File, path: &Path) -> io::Result<bool> {
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        let opened = opened.metadata()?;
        match std::fs::symlink_metadata(path) {
            Ok(named) => Ok((named.dev(), named.ino()) == (opened.dev(), opened.ino())),
            Err(why) if why.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(why) => Err(why),
        }
    }
    #[cfg(not(unix))]
    {
        let _ = opened;
        path.try_exists()
    }
}

/// The common prefix of the names of `target`'s siblings. A name that is too long is shortened.
fn prefix(target: &Path) -> OsString {
    const PARTIAL: &str = ".partial-";
    let name = target.file_name().unwrap_or_default();
    let mut prefix = OsString::from(".");
    prefix.push(beginning(name, LONGEST - 1 - PARTIAL.len() - RANDOM));
    prefix.push(PARTIAL);
    prefix
}

/// At most the first `bytes` bytes of a name, characters whole.
fn beginning(name: &OsStr, bytes: usize) -> PathBuf {
    if name.len() <= bytes {
        return name.into();
    }
    let text = name.to_string_lossy();
    text.char_indices()
        .map(|(start, character)| start + character.len_utf8())
        .take_while(|end| *end <= bytes)
        .last()
        .map_or(PathBuf::new(), |end| text[..end].into())
}

fn is_sibling(name: &OsStr, prefix: &OsStr) -> bool {
    let random = name.as_encoded_bytes().strip_prefix(prefix.as_encoded_bytes());
    random.is_some_and(|random| random.len() == RANDOM && random.iter().all(u8::is_ascii_alphanumeric))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::output::{NewFolder, write_file};

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<_> =
            std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn what_ended_runs_left_is_removed_and_what_is_in_use_stays() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.png");
        let here = |name: &str| folder.path().join(name);
        std::fs::write(here(".x.png.partial-abcDE1"), b"half").unwrap();
        std::fs::create_dir(here(".x.png.partial-abcDE2")).unwrap();
        std::fs::write(here(".x.png.partial-abcDE2/file"), b"half").unwrap();
        let others = [".x.png.partial-abc", ".x.png.partial-abcDE1.txt", ".y.png.partial-abcDE1", "x.png.partial-abcDE1"];
        others.iter().for_each(|name| std::fs::write(here(name), b"other").unwrap());
        let in_use = new_file(&path).unwrap();
        let folder_in_use = NewFolder::create(&path).unwrap();

        write_file(&path, |out| out.write_all(b"whole")).unwrap();
        assert!(in_use.path().exists() && folder_in_use.path().exists());
        let left = names(folder.path());
        assert!(!left.iter().any(|name| name.ends_with("abcDE1") && name.starts_with(".x") || name.ends_with("DE2")), "{left:?}");
        others.iter().for_each(|name| assert!(here(name).exists(), "{name}"));
        // Two in use, four others and the file.
        assert_eq!(left.len(), 7, "{left:?}");
    }

    #[cfg(unix)]
    #[test]
    fn links_and_pipes_of_such_names_are_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let precious = folder.path().join("precious");
        std::fs::write(&precious, b"precious").unwrap();
        std::os::unix::fs::symlink(&precious, folder.path().join(".x.partial-000000")).unwrap();
        std::os::unix::fs::symlink(folder.path(), folder.path().join(".x.partial-000001")).unwrap();
        let pipe = folder.path().join(".x.partial-000002");
        assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
        write_file(&folder.path().join("x"), |out| out.write_all(b"whole")).unwrap();
        assert_eq!(std::fs::read(&precious).unwrap(), b"precious");
        assert_eq!(names(folder.path()).len(), 5);
    }

    #[test]
    fn names_as_long_as_they_may_be() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["x".repeat(255), "é".repeat(127), "y".repeat(240)] {
            let path = folder.path().join(&name);
            write_file(&path, |out| out.write_all(b"whole")).unwrap();
            let dead = new_file(&path).unwrap();
            let (_, dead) = dead.keep().unwrap();
            assert!(dead.file_name().unwrap().len() <= LONGEST);
            write_file(&path, |out| out.write_all(b"whole")).unwrap();
            assert!(!dead.exists());
        }
        assert_eq!(names(folder.path()).len(), 3);
    }

    #[test]
    fn writers_of_one_file_at_a_time_do_not_take_each_other_for_dead() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x");
        std::thread::scope(|scope| {
            for writer in 0..4u8 {
                let path = &path;
                scope.spawn(move || {
                    for _ in 0..50 {
                        write_file(path, |out| out.write_all(&[writer; 100])).unwrap();
                    }
                });
            }
        });
        let content = std::fs::read(&path).unwrap();
        assert!(content.len() == 100 && content.iter().all(|byte| *byte == content[0]));
        assert_eq!(names(folder.path()), ["x"]);
    }
}
