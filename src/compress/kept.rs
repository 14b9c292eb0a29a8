//! Files of a run's folder besides finished layers, each with a seal.
//!
//! The seal of `NAME` is `NAME.sha256`: a hash of the file's hash and of the run's identity. Where
//! the seal is absent, writing was interrupted; where it does not fit, the file is damaged or
//! belongs to another run. In both cases the run makes the file again.

use std::path::Path;

use squeeze_base::digest;
use squeeze_base::error::Result;
use squeeze_base::input::{self, Limit};
use squeeze_base::output::write_file;

/// The state of a file in the run's folder.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Kept<T> {
    /// The file or its seal is absent.
    Absent,
    /// The content is not the one that was written.
    Damaged,
    /// The content that was written.
    Whole(T),
}

/// Seals hold 64 digits.
const SEAL: Limit = Limit { kind: "a seal", bytes: 1 << 10 };

/// Writes `content` to `folder/name`, and its seal.
pub(super) fn write(folder: &Path, run: &str, name: &str, content: &[u8]) -> Result<()> {
    write_file(&folder.join(name), |out| out.write_all(content))?;
    let seal = seal(run, &digest::of_bytes(content));
    write_file(&folder.join(format!("{name}.sha256")), |out| out.write_all(seal.as_bytes()))
}

/// Reads `folder/name` and checks it against its seal.
pub(super) fn read(folder: &Path, run: &str, name: &str) -> Kept<Vec<u8>> {
    if !has_seal(folder, name) {
        return Kept::Absent;
    }
    match input::read(&folder.join(name), Limit::RUN_STATE) {
        Ok(content) if fits(folder, run, name, &digest::of_bytes(&content)) => Kept::Whole(content),
        // A file that exists but cannot be read counts as damaged, too: a fault of the disk, for
        // example.
        Ok(_) | Err(_) => Kept::Damaged,
    }
}

/// Whether the file's writing was finished.
pub(super) fn has_seal(folder: &Path, name: &str) -> bool {
    folder.join(name).exists() && folder.join(format!("{name}.sha256")).exists()
}

/// Whether the seal of `folder/name` fits a content of this hash, in this run.
pub(super) fn fits(folder: &Path, run: &str, name: &str, sha256: &str) -> bool {
    let stored = input::read(&folder.join(format!("{name}.sha256")), SEAL);
    stored.is_ok_and(|stored| stored == seal(run, sha256).as_bytes())
}

fn seal(run: &str, sha256: &str) -> String {
    digest::of_entries([("run", run), ("sha256", sha256)].into_iter())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_flipped_bit_of_a_file_or_its_seal_is_found() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        assert_eq!(read(folder, "run", "notes"), Kept::Absent);
        write(folder, "run", "notes", b"some notes").unwrap();
        assert_eq!(read(folder, "run", "notes"), Kept::Whole(b"some notes".to_vec()));
        assert_eq!(read(folder, "another", "notes"), Kept::Damaged);
        for name in ["notes", "notes.sha256"] {
            let path = folder.join(name);
            let whole = std::fs::read(&path).unwrap();
            for bit in 0..8 * whole.len() {
                let mut damaged = whole.clone();
                damaged[bit / 8] ^= 1 << (bit % 8);
                std::fs::write(&path, damaged).unwrap();
                assert_eq!(read(folder, "run", "notes"), Kept::Damaged, "{name}, bit {bit}");
            }
            std::fs::write(&path, &whole[1..]).unwrap();
            assert_eq!(read(folder, "run", "notes"), Kept::Damaged);
            std::fs::write(&path, whole).unwrap();
        }
        std::fs::remove_file(folder.join("notes.sha256")).unwrap();
        assert_eq!(read(folder, "run", "notes"), Kept::Absent);
    }
}
