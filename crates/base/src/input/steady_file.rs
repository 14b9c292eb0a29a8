//! A file that is read over minutes or hours and must not change meanwhile.

use std::fs::{File, Metadata};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock, PoisonError};

use sha2::{Digest, Sha256};

use crate::digest;
use crate::error::{Error, Result};
use crate::input;

/// An open regular file. Every read is followed by a look at the file's times and size, so that
/// bytes of a file that another program overwrites or cuts short are not used.
///
/// Files are read, not mapped: shortening a mapped file ends the program with SIGBUS. A file that
/// is replaced by another of its name (as editors and package managers do) is still read in its old
/// form.
#[derive(Debug)]
pub struct SteadyFile {
    path: PathBuf,
    file: File,
    bytes: u64,
    stamp: Mutex<Stamp>,
    sha256: OnceLock<String>,
}

/// The system's record of a file's state.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Stamp {
    content: Content,
    /// The last change of content, name, links or owner: seconds and nanoseconds.
    changed: (i64, i64),
}

/// The part of the record that every write changes.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Content {
    device: u64,
    inode: u64,
    bytes: u64,
    /// The last write: seconds and nanoseconds.
    modified: (i64, i64),
}

impl Stamp {
    #[cfg(unix)]
    fn of(metadata: &Metadata) -> Self {
        use std::os::unix::fs::MetadataExt;
        Stamp {
            content: Content {
                device: metadata.dev(),
                inode: metadata.ino(),
                bytes: metadata.size(),
                modified: (metadata.mtime(), metadata.mtime_nsec()),
            },
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }

    #[cfg(not(unix))]
    fn of(metadata: &Metadata) -> Self {
        let since = |time: std::time::SystemTime| time.duration_since(std::time::UNIX_EPOCH).ok();
        let modified =
            metadata.modified().ok().and_then(since).map_or((0, 0), |time| (time.as_secs() as i64, time.subsec_nanos().into()));
        Stamp { content: Content { device: 0, inode: 0, bytes: metadata.len(), modified }, changed: (0, 0) }
    }
}

impl SteadyFile {
    /// Opens `path`.
    ///
    /// # Errors
    /// [`Error::Read`]; [`Error::BadFile`] if it is not a regular file.
    pub fn open(path: &Path) -> Result<Self> {
        let file = input::open(path)?;
        let stamp = Stamp::of(&file.metadata().map_err(Error::read(path))?);
        let (bytes, stamp) = (stamp.content.bytes, Mutex::new(stamp));
        Ok(SteadyFile { path: path.to_owned(), file, bytes, stamp, sha256: OnceLock::new() })
    }

    /// The path by which it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its length when it was opened.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Fills `buffer` with the file's bytes from `offset` on.
    ///
    /// # Errors
    /// [`Error::Changed`] if the file is not as it was; [`Error::Read`].
    pub fn read(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        let read = read_exact_at(&self.file, buffer, offset);
        // A shortened file fails to read, but that it was changed is the better message.
        self.check()?;
        read.map_err(Error::read(&self.path))
    }

    /// SHA-256 of the whole file, in hex. It is read once.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn sha256(&self) -> Result<String> {
        if let Some(known) = self.sha256.get() {
            return Ok(known.clone());
        }
        let mut hash = Sha256::new();
        self.for_each_block(0..self.bytes, |block| hash.update(block))?;
        Ok(self.learn(digest::hex(hash)))
    }

    /// The hash of the whole file, if it has been computed.
    #[must_use]
    pub fn known_sha256(&self) -> Option<&str> {
        self.sha256.get().map(String::as_str)
    }

    /// Remembers the hash of the whole file, which the caller has computed while reading it.
    pub fn learn(&self, sha256: String) -> String {
        self.sha256.get_or_init(|| sha256).clone()
    }

    /// Gives the bytes of `range` one block after the other. Blocks begin at multiples of 1 MiB
    /// from the range's beginning.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn for_each_block(&self, range: std::ops::Range<u64>, mut take: impl FnMut(&[u8])) -> Result<()> {
        self.blocks(range, &mut take).map_err(Error::read(&self.path)).or_else(|why| self.check().and(Err(why)))?;
        self.check()
    }

    fn blocks(&self, range: std::ops::Range<u64>, take: &mut dyn FnMut(&[u8])) -> std::io::Result<()> {
        const BLOCK: u64 = 1 << 20;
        let mut buffer = vec![0; BLOCK.min(range.end - range.start) as usize];
        let mut at = range.start;
        while at < range.end {
            let block = &mut buffer[..BLOCK.min(range.end - at) as usize];
            read_exact_at(&self.file, block, at)?;
            take(block);
            at += block.len() as u64;
        }
        Ok(())
    }

    /// Checks that the file was not changed since it was opened.
    ///
    /// # Errors
    /// [`Error::Changed`] if it was written to or cut short; [`Error::Read`].
    pub fn check(&self) -> Result<()> {
        let now = Stamp::of(&self.file.metadata().map_err(Error::read(&self.path))?);
        // The stamp is replaced whole, so that a panicked thread cannot have left half of one.
        let mut stamp = self.stamp.lock().unwrap_or_else(PoisonError::into_inner);
        if now == *stamp {
            return Ok(());
        }
        if now.content != stamp.content {
            return Err(Error::Changed { path: self.path.clone() });
        }
        // The file has another name, owner or mode, or its name was given to another file; or it
        // was written to and its time set back. The hash tells, if it is known.
        if let Some(known) = self.sha256.get() {
            let mut hash = Sha256::new();
            self.blocks(0..self.bytes, &mut |block| hash.update(block)).map_err(Error::read(&self.path))?;
            if digest::hex(hash) != *known {
                return Err(Error::Changed { path: self.path.clone() });
            }
        }
        *stamp = now;
        Ok(())
    }
}

/// Fills `buffer` from `offset` on, independent of other readers of the file.
fn read_exact_at(file: &File, buffer: &mut [u8], offset: u64) -> std::io::Result<()> {
    #[cfg(unix)]
    return std::os::unix::fs::FileExt::read_exact_at(file, buffer, offset);
    #[cfg(windows)]
    {
        use std::os::windows::fs::FileExt;
        let mut filled = 0;
        while filled < buffer.len() {
            match file.seek_read(&mut buffer[filled..], offset + filled as u64)? {
                0 => return Err(std::io::ErrorKind::UnexpectedEof.into()),
                count => filled += count,
            }
        }
        Ok(())
    }
}

#[cfg(all(test, unix))]
mod tests {
    use std::io::{Seek, SeekFrom, Write};

    use super::*;

    fn made() -> (tempfile::TempDir, PathBuf, SteadyFile) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model");
        std::fs::write(&path, vec![7; 3_000_000]).unwrap();
        // The times of most systems tick in milliseconds.
        std::thread::sleep(std::time::Duration::from_millis(20));
        let file = SteadyFile::open(&path).unwrap();
        (folder, path, file)
    }

    fn is_refused(file: &SteadyFile, path: &Path) {
        let mut buffer = [0; 100];
        for why in [
            file.read(&mut buffer, 2_999_000).unwrap_err(),
            file.check().unwrap_err(),
            file.for_each_block(0..3_000_000, |_| {}).unwrap_err(),
        ] {
            assert!(matches!(&why, Error::Changed { path: named } if named == path), "{why}");
            assert!(!why.is_bad_input());
        }
    }

    #[test]
    fn what_is_written_or_cut_is_not_used() {
        let (_folder, path, file) = made();
        file.read(&mut [0; 10], 5).unwrap();
        let mut other = File::options().write(true).open(&path).unwrap();
        other.seek(SeekFrom::Start(77)).unwrap();
        other.write_all(b"8").unwrap();
        is_refused(&file, &path);

        let (_folder, path, file) = made();
        File::options().write(true).open(&path).unwrap().set_len(1000).unwrap();
        is_refused(&file, &path);
    }

    #[test]
    fn a_file_of_the_same_name_does_no_harm() {
        let (folder, path, file) = made();
        let before = file.sha256().unwrap();
        let other = folder.path().join("other");
        std::fs::write(&other, vec![8; 3_000_000]).unwrap();
        std::fs::rename(&other, &path).unwrap();
        let mut buffer = [0; 10];
        file.read(&mut buffer, 12).unwrap();
        assert_eq!((buffer, file.sha256().unwrap()), ([7; 10], before));
        std::fs::remove_file(&path).unwrap();
        file.check().unwrap();
    }

    #[test]
    fn a_write_whose_time_is_set_back_is_found_by_the_hash() {
        let (_folder, path, file) = made();
        file.sha256().unwrap();
        let time = std::fs::metadata(&path).unwrap().modified().unwrap();
        let mut other = File::options().write(true).open(&path).unwrap();
        other.write_all(b"8").unwrap();
        other.set_modified(time).unwrap();
        drop(other);
        is_refused(&file, &path);
    }

    #[test]
    fn blocks_are_the_file() {
        let (_folder, path, file) = made();
        let mut sizes = Vec::new();
        file.for_each_block(10..2_100_000, |block| sizes.push(block.len())).unwrap();
        assert_eq!(sizes, [1 << 20, 1 << 20, 2_099_990 - (2 << 20)]);
        assert_eq!(file.sha256().unwrap(), digest::of_bytes(&std::fs::read(&path).unwrap()));
        assert!(matches!(file.read(&mut [0; 2], 2_999_999).unwrap_err(), Error::Read { .. }));
    }
}
