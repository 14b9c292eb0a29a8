//! Reads files that may be of any size and kind: devices, endless pipes, other formats.

mod other_format;
mod prompt;
mod source_file;
mod steady_file;

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::path::Path;

pub use other_format::{START, other_format};
pub use prompt::prompt_of_length;
pub use prompt::{PROMPT_BYTES, check_prompt};
pub use source_file::SourceFile;
pub use steady_file::SteadyFile;

use crate::error::{Error, Result};

/// A kind of small file, and the most bytes that one may have.
///
/// A larger file is refused before it is read: it must be of another kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limit {
    /// The kind, with its article, as in "is too large for a config file".
    pub kind: &'static str,
    /// The most bytes.
    pub bytes: u64,
}

impl Limit {
    /// A diffusers or transformers `config.json` or `model_index.json`: a few KiB.
    pub const MODEL_CONFIG: Limit = Limit { kind: "a config file", bytes: 16 << 20 };
    /// A run config in YAML: a few KiB, or 100 KiB with a rule for each layer.
    pub const RUN_CONFIG: Limit = Limit { kind: "a run config", bytes: 1 << 20 };
    /// A file of prompts or captions, one a line.
    pub const PROMPTS: Limit = Limit { kind: "a file of prompts", bytes: 16 << 20 };
    /// The index of a checkpoint in several files.
    pub const SHARD_INDEX: Limit = Limit { kind: "an index of shards", bytes: 64 << 20 };
    /// A tokenizer's vocabulary, merges or settings: CLIP's have about 1 MiB.
    pub const TOKENIZER: Limit = Limit { kind: "a tokenizer's file", bytes: 64 << 20 };
    /// The manifest of a Core ML package: a few hundred bytes.
    pub const MANIFEST: Limit = Limit { kind: "a manifest", bytes: 1 << 20 };
    /// The program of a Core ML package: SDXL's has 10 MB.
    pub const PROGRAM: Limit = Limit { kind: "a UNet's program", bytes: 256 << 20 };
    /// A picture: 4,096 x 4,096 pixels of noise have 50 MB.
    pub const PICTURE: Limit = Limit { kind: "a picture", bytes: 256 << 20 };
    /// The notes of a run in its work folder.
    pub const RUN_STATE: Limit = Limit { kind: "a run's own notes", bytes: 256 << 20 };
}

/// Opens `path` for reading if it is a regular file, or a link to one. Folders, devices, pipes and
/// sockets are refused at once: opening a pipe could wait for ever, and a device has no end.
///
/// # Errors
/// [`Error::Read`] if it cannot be opened, [`Error::BadFile`] if it is not a regular file.
pub fn open(path: &Path) -> Result<File> {
    let mut options = OpenOptions::new();
    options.read(true);
    #[cfg(unix)]
    {
        use std::os::unix::fs::OpenOptionsExt;
        // Without this flag, opening a pipe waits for a writer. For regular files it has no effect.
        options.custom_flags(libc::O_NONBLOCK);
    }
    let file = options.open(path).map_err(|why| unopened(path, why))?;
    let kind = file.metadata().map_err(Error::read(path))?.file_type();
    if kind.is_file() {
        return Ok(file);
    }
    Err(Error::bad_file(path, format!("is {}, not a regular file", name_of(kind))))
}

/// A link to nothing has a sentence of its own: for the system it is a file that does not exist.
fn unopened(path: &Path, why: io::Error) -> Error {
    match std::fs::read_link(path) {
        Ok(target) if why.kind() == io::ErrorKind::NotFound => {
            let target = target.display();
            Error::bad_file(
                path,
                format!(
                    "is a link to {target}, which does not exist. A model in the hub's cache is links to the folder `blobs` beside \
                     `snapshots`: copy it with `cp -rL`, or download it again"
                ),
            )
        }
        _ => Error::read(path)(why),
    }
}

/// Reads the whole of a small regular file.
///
/// # Errors
/// As [`open`]; [`Error::BadFile`] if it has more bytes than `limit` allows, or is a pointer of
/// git-lfs or a web page.
pub fn read(path: &Path, limit: Limit) -> Result<Vec<u8>> {
    let file = open(path)?;
    let size = file.metadata().map_err(Error::read(path))?.len();
    let too_large =
        |size: u64| Error::bad_file(path, format!("{size} bytes is too large for {} (at most {})", limit.kind, limit.bytes));
    if size > limit.bytes {
        return Err(too_large(size));
    }
    // The size is that of a moment ago, and special files report 0: so the bytes are counted too.
    let mut content = Vec::with_capacity(size as usize);
    let count = file.take(limit.bytes + 1).read_to_end(&mut content).map_err(Error::read(path))? as u64;
    if count > limit.bytes {
        return Err(too_large(count));
    }
    match other_format::placeholder(&content[..content.len().min(START)]) {
        Some(problem) => Err(Error::bad_file(path, problem)),
        None => Ok(content),
    }
}

/// Reads the whole of a small regular file of UTF-8 text.
///
/// # Errors
/// As [`read`]; [`Error::BadFile`] saying where it is not UTF-8.
pub fn read_text(path: &Path, limit: Limit) -> Result<String> {
    String::from_utf8(read(path, limit)?)
        .map_err(|why| Error::bad_file(path, format!("is not UTF-8 text from byte {}", why.utf8_error().valid_up_to())))
}

/// The kind of a file, with its article.
#[must_use]
pub fn name_of(kind: std::fs::FileType) -> &'static str {
    #[cfg(unix)]
    {
        use std::os::unix::fs::FileTypeExt;
        if kind.is_fifo() {
            return "a pipe";
        }
        if kind.is_socket() {
            return "a socket";
        }
        if kind.is_char_device() || kind.is_block_device() {
            return "a device";
        }
    }
    if kind.is_dir() {
        "a folder"
    } else if kind.is_file() {
        "a file"
    } else {
        "something else"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALL: Limit = Limit { kind: "a test's file", bytes: 8 };

    #[test]
    fn small_regular_files_are_read_and_nothing_else_is() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let refused = |path: &Path| read_text(path, SMALL).unwrap_err().to_string();
        for (content, whole) in [(&b""[..], true), (b"12345678", true), (b"123456789", false)] {
            std::fs::write(&path, content).unwrap();
            match read(&path, SMALL) {
                Ok(read) => assert!(whole && read == content),
                Err(why) => {
                    assert!(!whole && why.to_string().contains("9 bytes is too large for a test's file (at most 8)"), "{why}")
                }
            }
        }
        std::fs::write(&path, b"ab\xff").unwrap();
        assert!(refused(&path).contains("is not UTF-8 text from byte 2"));
        assert!(refused(folder.path()).contains("is a folder, not a regular file"));
        assert!(refused(&folder.path().join("absent")).contains("cannot read"));
    }

    #[cfg(unix)]
    #[test]
    fn devices_pipes_and_sockets_are_refused_at_once() {
        let folder = tempfile::tempdir().unwrap();
        let refused = |path: &Path| open(path).unwrap_err();
        assert!(refused(Path::new("/dev/zero")).to_string().contains("is a device"));
        let pipe = folder.path().join("pipe");
        assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
        assert!(refused(&pipe).to_string().contains("is a pipe"));
        let socket = folder.path().join("socket");
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        // A socket cannot be opened at all.
        assert!(refused(&socket).is_bad_input());
        let link = folder.path().join("link");
        std::os::unix::fs::symlink(&pipe, &link).unwrap();
        assert!(refused(&link).to_string().contains("is a pipe"));
    }
}
