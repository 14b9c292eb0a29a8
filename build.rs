//! Writes libtorch's folder into the binary (rpath), so that nobody has to set `LD_LIBRARY_PATH`; and a build id.

use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    if let Some(lib) = std::env::var_os("DEP_TCH_LIBTORCH_LIB") {
        // The folder itself, not a link to it: the binary then also works away from the checkout.
        let lib = std::path::PathBuf::from(lib);
        let lib = lib.canonicalize().unwrap_or(lib);
        println!("cargo:rustc-link-arg=-Wl,-rpath,{}", lib.display());
    }
    println!("cargo:rustc-env=SDXL_SQUEEZE_BUILD={}", build_id());
}

/// The first 16 hex digits of a hash of all that the program is compiled from: a run that was begun by one build and resumed by another
/// would be of neither. Not of git's state: a tarball has none, and changes that are not committed count.
fn build_id() -> String {
    let mut files = vec![PathBuf::from("Cargo.lock")];
    sources(Path::new("src"), &mut files);
    files.sort();
    let mut hash = Sha256::new();
    for path in files {
        // A package without a lock file is built all the same.
        let content = std::fs::read(&path).unwrap_or_default();
        hash.update(path.to_string_lossy().replace('\\', "/"));
        hash.update([0]);
        hash.update((content.len() as u64).to_le_bytes());
        hash.update(&content);
    }
    println!("cargo:rerun-if-changed=Cargo.lock");
    println!("cargo:rerun-if-changed=src");
    hash.finalize().iter().take(8).map(|byte| format!("{byte:02x}")).collect()
}

/// Adds the files below `folder`.
fn sources(folder: &Path, files: &mut Vec<PathBuf>) {
    let Ok(entries) = std::fs::read_dir(folder) else { return };
    for path in entries.flatten().map(|entry| entry.path()) {
        if path.is_dir() {
            sources(&path, files);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
}
