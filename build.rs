//! Sets the rpath of the programs, so that they find libtorch without `LD_LIBRARY_PATH`, computes
//! the build id, and lists the files that the program carries inside of it.

use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-env-changed=SDXL_SQUEEZE_RPATH");
    // Windows has no rpath: it looks for libraries beside the program and in `PATH`.
    let has_rpath = std::env::var("CARGO_CFG_TARGET_OS").is_ok_and(|system| system != "windows");
    if let Some(libraries) = libraries().filter(|_| has_rpath) {
        println!("cargo:rustc-link-arg=-Wl,-rpath,{}", libraries.display());
    }
    println!("cargo:rustc-env=SDXL_SQUEEZE_BUILD={}", build_id());
    list_shipped();
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
    add_files(folder, files, &|path| has_extension(path, "rs"));
}

/// Adds the files below `folder` that `wanted` accepts to `files`.
fn add_files(folder: &Path, files: &mut Vec<PathBuf>, wanted: &dyn Fn(&Path) -> bool) {
    for entry in std::fs::read_dir(folder).expect("the folders of the package are readable") {
        let path = entry.expect("the folders of the package are readable").path();
        if path.is_dir() {
            add_files(&path, files, wanted);
        } else if wanted(&path) {
            files.push(path);
        }
    }
}

fn has_extension(path: &Path, wanted: &str) -> bool {
    path.extension().is_some_and(|extension| extension == wanted)
}

/// Writes `shipped.rs` for `src/shipped`: every config, every file of prompts and the bundled model,
/// each with its path and its content, in the order of their paths.
fn list_shipped() {
    const MODEL: &str = "models/emoji-sdxl";
    let sorted = |folder: &str, wanted: &dyn Fn(&Path) -> bool| {
        println!("cargo:rerun-if-changed={folder}");
        let mut files = Vec::new();
        add_files(Path::new(folder), &mut files, wanted);
        files.sort();
        files
    };
    // The files beside the folders of its parts made the model; its README has the licences.
    let of_model = |path: &Path| {
        let is_of_part = path.parent() != Some(Path::new(MODEL));
        is_of_part || path.ends_with("model_index.json") || path.ends_with("README.md")
    };
    let configs = sorted("configs", &|path| has_extension(path, "yaml"));
    let prompts = sorted("calibration", &|path| has_extension(path, "txt"));
    let model = sorted(MODEL, &of_model);

    let mut hash = Sha256::new();
    for path in &model {
        hash.update(path.to_string_lossy().replace('\\', "/"));
        hash.update(std::fs::read(path).expect("the files of the package are readable"));
    }
    let id: String = hash.finalize().iter().take(8).map(|byte| format!("{byte:02x}")).collect();

    let list = |name: &str, content: &str, include: &str, paths: &[PathBuf], folder: &str| {
        let rows = paths.iter().map(|path| {
            let path = path.to_string_lossy().replace('\\', "/");
            let below = path.strip_prefix(folder).unwrap_or(&path);
            format!("    ({below:?}, {include}!(concat!(env!(\"CARGO_MANIFEST_DIR\"), {:?}))),\n", format!("/{path}"))
        });
        format!("static {name}: &[(&str, {content})] = &[\n{}];\n", rows.collect::<String>())
    };
    let text = [
        list("CONFIGS", "&str", "include_str", &configs, ""),
        list("PROMPTS", "&str", "include_str", &prompts, ""),
        list("MODEL", "&[u8]", "include_bytes", &model, &format!("{MODEL}/")),
        format!("const MODEL_ID: &str = {id:?};\n"),
    ];
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    std::fs::write(out.join("shipped.rs"), text.concat()).expect("cargo's output folder is writable");
}
