//! The folder for the files of a target. It is in memory if the system has `/dev/shm`.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use tempfile::TempDir;

/// The folder of this process, which all inputs use.
pub fn folder() -> &'static Path {
    static FOLDER: OnceLock<TempDir> = OnceLock::new();
    FOLDER
        .get_or_init(|| {
            let memory = Path::new("/dev/shm");
            let parent = if memory.is_dir() { memory.to_owned() } else { std::env::temp_dir() };
            tempfile::Builder::new().prefix("sdxl-squeeze-fuzz-").tempdir_in(parent).expect("a folder for files can be made")
        })
        .path()
}

/// Writes the file `name` and returns its path.
///
/// The previous file is removed instead of overwritten, so that a memory map of it stays valid.
pub fn file(name: &str, content: &[u8]) -> PathBuf {
    let path = folder().join(name);
    let _ = std::fs::remove_file(&path);
    std::fs::write(&path, content).expect("the folder for files can be written");
    path
}
