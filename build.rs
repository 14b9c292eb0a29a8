//! Sets the rpath of the programs, so that they find libtorch without `LD_LIBRARY_PATH`, and
//! computes the build id.

use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-env-changed=SDXL_SQUEEZE_RPATH");
    if let Some(libraries) = libraries() {
        println!("cargo:rustc-link-arg=-Wl,-rpath,{}", libraries.display());
    }
    println!("cargo:rustc-env=SDXL_SQUEEZE_BUILD={}", build_id());
}

/// The folder in which the program looks for libtorch: that of the build, or what
/// `SDXL_SQUEEZE_RPATH` says, for a program that is shipped (`python/build_backend/`).
fn libraries() -> Option<PathBuf> {
    if let Some(given) = std::env::var_os("SDXL_SQUEEZE_RPATH") {
        return Some(PathBuf::from(given));
    }
    let libraries = PathBuf::from(std::env::var_os("DEP_TCH_LIBTORCH_LIB")?);
    // Without links in its path, the program also works when the checkout has moved.
    Some(libraries.canonicalize().unwrap_or(libraries))
}

/// The first 16 hex digits of a hash of the sources and of `Cargo.lock`.
///
/// A run that was begun by one build and resumed by another would mix the results of both, so a
/// resumed run compares this id. It does not come from git: a tarball has no history, and
/// uncommitted changes count too.
fn build_id() -> String {
    let mut files = Vec::new();
    add_sources(Path::new("src"), &mut files);
    add_sources(Path::new("crates"), &mut files);
    // A published crate may come without its lock file.
    let lock = PathBuf::from("Cargo.lock");
    if lock.exists() {
        files.push(lock);
    }
    files.sort();
    let mut hash = Sha256::new();
    for path in files {
        let content = std::fs::read(&path).expect("the files of the package are readable");
        hash.update(path.to_string_lossy().replace('\\', "/"));
        hash.update([0]);
        hash.update((content.len() as u64).to_le_bytes());
        hash.update(&content);
    }
    println!("cargo:rerun-if-changed=Cargo.lock");
    println!("cargo:rerun-if-changed=src");
    println!("cargo:rerun-if-changed=crates");
    hash.finalize().iter().take(8).map(|byte| format!("{byte:02x}")).collect()
}

/// Adds the Rust files below `folder` to `files`.
fn add_sources(folder: &Path, files: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).expect("the folders of the package are readable") {
        let path = entry.expect("the folders of the package are readable").path();
        if path.is_dir() {
            add_sources(&path, files);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
}
