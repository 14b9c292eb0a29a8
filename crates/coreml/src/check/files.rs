//! Checks that a package's folder holds its three files and no others.

use std::path::{Path, PathBuf};

use squeeze_base::error::{Error, Result};

use crate::manifest::{BLOBS, MODEL, WEIGHTS};

/// Refuses files and folders that no hash covers: programs that unpack or sign the package would
/// include them.
pub(super) fn check(package: &Path) -> Result<()> {
    let data = package.join("Data");
    let files = [package.join("Manifest.json"), data.join(MODEL), data.join(WEIGHTS).join(BLOBS)];
    let mut folders = vec![package.to_owned()];
    while let Some(folder) = folders.pop() {
        for path in entries(&folder)? {
            if files.contains(&path) {
                continue;
            }
            if files.iter().any(|file| file.starts_with(&path)) {
                folders.push(path);
                continue;
            }
            let strange = path.strip_prefix(package).expect("a folder's entries begin with its path").display().to_string();
            return Err(Error::bad_file(package, format!("`{strange}` was not written with this package; remove it")));
        }
    }
    Ok(())
}

/// The paths in a folder, sorted.
fn entries(folder: &Path) -> Result<Vec<PathBuf>> {
    let read = || std::fs::read_dir(folder)?.map(|entry| Ok(entry?.path())).collect::<std::io::Result<Vec<_>>>();
    let mut paths = read().map_err(Error::read(folder))?;
    paths.sort();
    Ok(paths)
}
