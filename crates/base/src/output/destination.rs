//! The destination of an output: the end of its path, links followed, and whether it can be
//! replaced.

use std::fs::{File, FileType, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};

use super::parent::parent;
use crate::error::{Error, Result};
use crate::input::name_of;

/// The destination of a file's content.
#[derive(Debug)]
pub(super) enum Destination {
    /// A regular file, or an unused name: a new file will replace it.
    File(PathBuf),
    /// A stream, which cannot be replaced and is written to.
    Stream(Stream),
}

/// A destination that is written to directly.
#[derive(Debug)]
pub(super) enum Stream {
    /// The program's own standard output. It is not opened anew: two openings of one file overwrite
    /// each other.
    StandardOutput,
    /// A device, a pipe or an open descriptor.
    At(PathBuf),
}

impl Destination {
    /// The destination of `path`, links followed.
    pub(super) fn of(path: &Path) -> Result<Self> {
        let (end, kind) = follow(path).map_err(|why| unusable(path, why))?;
        match kind {
            End::Absent => Ok(Destination::File(end)),
            End::Descriptor if descriptor_of(&end) == Some(1) => Ok(Destination::Stream(Stream::StandardOutput)),
            End::Descriptor => Ok(Destination::Stream(Stream::At(end))),
            End::There(kind) if kind.is_file() => Ok(Destination::File(end)),
            End::There(kind) if is_stream(kind) => Ok(Destination::Stream(Stream::At(end))),
            End::There(kind) => Err(Error::Argument(format!("cannot write {}: it is {}", path.display(), name_of(kind)))),
        }
    }
}

/// Whether `path` is the program's own standard output.
#[must_use]
pub fn is_standard_output(path: &Path) -> bool {
    matches!(Destination::of(path), Ok(Destination::Stream(Stream::StandardOutput)))
}

/// Whether [`write_file`](super::write_file) would replace a file. Devices, pipes and open
/// descriptors are not replaced.
#[must_use]
pub fn would_replace(path: &Path) -> bool {
    matches!(Destination::of(path), Ok(Destination::File(end)) if end.is_file())
}

/// Where the new folder `path` will be.
pub(super) fn of_folder(path: &Path) -> Result<PathBuf> {
    let there = |what: &str| Err(Error::Argument(format!("{} is {what}; name a new folder", path.display())));
    let (end, kind) = follow(path).map_err(|why| unusable(path, why))?;
    match kind {
        End::Absent if end.file_name().is_some() => Ok(end),
        End::There(kind) if kind.is_dir() => {
            // Its full name, as `.` cannot be renamed to.
            let end = end.canonicalize().map_err(Error::write(path))?;
            match std::fs::read_dir(&end).map_err(Error::write(path))?.next() {
                None => Ok(end),
                Some(_) => there("there already"),
            }
        }
        End::There(kind) if kind.is_file() => there("there already"),
        End::There(kind) => there(name_of(kind)),
        End::Absent | End::Descriptor => there("no folder's name"),
    }
}

impl Stream {
    pub(super) fn write(&mut self, content: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> io::Result<()> {
        let mut out: Box<dyn Write> = match self {
            Stream::StandardOutput => Box::new(io::stdout().lock()),
            // Where the descriptor is a file's, others write to it too: each after what is there.
            Stream::At(path) => Box::new(io::BufWriter::new(open(path)?)),
        };
        content(&mut out)?;
        out.flush()
    }
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().append(true).open(path)
}

/// The end of a path.
enum End {
    Absent,
    /// A descriptor that this program has open, under one of the names that the system has for
    /// those.
    Descriptor,
    There(FileType),
}

/// A path that no file can have is a mistake of whoever wrote it; anything else is the system's.
fn unusable(path: &Path, why: io::Error) -> Error {
    match why.kind() {
        ErrorKind::InvalidFilename | ErrorKind::NotADirectory => {
            Error::Argument(format!("cannot write {}: {why}", path.display()))
        }
        _ => Error::write(path)(why),
    }
}

/// Follows links to their end.
fn follow(path: &Path) -> io::Result<(PathBuf, End)> {
    /// As many as Linux follows.
    const LINKS: usize = 40;
    let mut at = path.to_owned();
    for _ in 0..=LINKS {
        let kind = match std::fs::symlink_metadata(&at) {
            Ok(found) => found.file_type(),
            Err(why) if why.kind() == ErrorKind::NotFound => return Ok((at, End::Absent)),
            Err(why) => return Err(why),
        };
        if !kind.is_symlink() {
            return Ok((at, End::There(kind)));
        }
        if descriptor_of(&at).is_some() {
            return Ok((at, End::Descriptor));
        }
        at = parent(&at).join(std::fs::read_link(&at)?);
    }
    Err(io::Error::new(ErrorKind::InvalidInput, "more links than can be followed"))
}

/// The number of the descriptor that `link` stands for: Linux has them as links in `/proc/self/fd`,
/// which lead to the files' names.
fn descriptor_of(link: &Path) -> Option<u32> {
    let own = Path::new("/proc/self/fd").canonicalize().ok()?;
    let folder = parent(link).canonicalize().ok()?;
    if folder != own {
        return None;
    }
    link.file_name()?.to_str()?.parse().ok()
}

/// Whether something takes bytes one after another and keeps its name: a device such as a terminal,
/// or a pipe.
fn is_stream(kind: FileType) -> bool {
    #[cfg(unix)]
    {
        use std::os::unix::fs::FileTypeExt;
        kind.is_fifo() || kind.is_char_device()
    }
    #[cfg(not(unix))]
    {
        let _ = kind;
        false
    }
}
