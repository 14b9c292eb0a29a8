//! What is said of a path where a model should be and is not.

use std::io::ErrorKind;
use std::path::{Component, Path, PathBuf};

use squeeze_base::error::{Error, Result};

/// Checks that `path` is a file, or a folder in diffusers layout.
///
/// # Errors
/// [`Error::BadFile`] that says what the path is, and what to give in its place; [`Error::Read`] if
/// the system refuses to tell.
pub fn check_model(path: &Path) -> Result<()> {
    if path.is_file() || path.join("model_index.json").symlink_metadata().is_ok() {
        return Ok(());
    }
    match path.symlink_metadata() {
        Err(why) if why.kind() != ErrorKind::NotFound => Err(Error::read(path)(why)),
        _ => Err(Error::bad_file(path, problem(path))),
    }
}

/// What `path` is, as the end of a sentence that begins with it.
fn problem(path: &Path) -> String {
    const WANTED: &str = "a model is a folder with model_index.json, unet/, vae/, scheduler/ and two text encoders with their \
                          tokenizers, as diffusers writes it, or a single-file checkpoint (.safetensors)";
    if path.symlink_metadata().is_err() {
        if let Some(repository) = repository(path) {
            return format!(
                "is not here. The name of a repository is not enough, as this program downloads nothing: download the model by \
                 `hf download {repository} --local-dir DIR` and give DIR"
            );
        }
        return format!("does not exist; {WANTED}");
    }
    if !path.is_dir() {
        return format!("is neither a file nor a folder; {WANTED}");
    }
    if let Some(snapshot) = snapshot(path) {
        return format!("is the hub's cache of a model; give the snapshot in it: {}", snapshot.display());
    }
    if path.join("config.json").is_file() && path.file_name().is_some_and(|name| name == "unet") {
        return "is the folder of a UNet alone; give the folder above it, which has the text encoders, the VAE and the scheduler"
            .into();
    }
    format!("has no model_index.json; {WANTED}")
}

/// `path`, if it is of the form `owner/name`.
fn repository(path: &Path) -> Option<&str> {
    let is_repository = path.components().count() == 2 && path.components().all(|part| matches!(part, Component::Normal(_)));
    let is_file =
        path.extension().is_some_and(|extension| ["safetensors", "ckpt", "pt", "bin", "gguf"].iter().any(|e| extension == *e));
    path.to_str().filter(|_| is_repository && !is_file)
}

/// The latest snapshot of the model in a folder of the hub's cache.
fn snapshot(path: &Path) -> Option<PathBuf> {
    let snapshots = std::fs::read_dir(path.join("snapshots")).ok()?.flatten();
    let whole = snapshots.map(|entry| entry.path()).filter(|folder| folder.join("model_index.json").exists());
    whole.max_by_key(|folder| folder.metadata().and_then(|about| about.modified()).ok())
}
