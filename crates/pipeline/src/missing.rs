//! Errors about a model's folder in which files are missing: which files are wanted, and what the
//! folder seems to be.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use squeeze_base::error::{Error, Result};

/// The files of a pipeline that are wanted beside those of its parts.
const INDEX: &str = "model_index.json";

/// Refuses a path without `model_index.json`, which is no pipeline's folder.
///
/// # Errors
/// [`Error::Argument`] that says what the path seems to be, and what is wanted.
pub fn check_index(root: &Path) -> Result<()> {
    if exists(&root.join(INDEX)) {
        return Ok(());
    }
    let cannot = format!("cannot read {}: No such file or directory", root.join(INDEX).display());
    Err(Error::Argument(format!("{cannot}; {}", what_it_is(root))))
}

/// Refuses a folder in which any of `wanted` is missing, all of them in one message.
///
/// # Errors
/// [`Error::Argument`] with their names.
pub(crate) fn check_files(root: &Path, wanted: &[PathBuf]) -> Result<()> {
    let missing: Vec<&PathBuf> = wanted.iter().filter(|file| !exists(&root.join(file))).collect();
    let [first, rest @ ..] = &missing[..] else { return Ok(()) };
    let rest: String = rest.iter().map(|file| format!(", {}", file.display())).collect();
    let first = root.join(first);
    let remedy = "the model is not whole; fetch or copy it anew with all of its folders";
    Err(Error::Argument(format!("cannot read {}{rest}: No such file or directory; {remedy}", first.display())))
}

fn exists(path: &Path) -> bool {
    // A broken link is a mistake of its own, which reading reports.
    std::fs::symlink_metadata(path).is_ok()
}

/// A sentence about a path without `model_index.json`.
pub(crate) fn what_it_is(root: &Path) -> String {
    const WANTED: &str = "a model is a folder in diffusers layout (model_index.json and the folders scheduler, unet, vae, text_encoder, \
                          text_encoder_2, tokenizer, tokenizer_2) or a single-file checkpoint (.safetensors)";
    let shown = root.display();
    if !exists(root) {
        return match repository(root) {
            Some(name) => format!(
                "there is no folder {shown} here, and nothing is downloaded; if it is a model of Hugging Face, fetch it first: \
                 hf download {name} --local-dir DIR"
            ),
            None => format!("there is no {shown}; {WANTED}"),
        };
    }
    if let Some(snapshot) = snapshot(root) {
        return format!("{shown} is the hub's cache of a model; name the snapshot in it: {}", snapshot.display());
    }
    let files: Vec<PathBuf> = std::fs::read_dir(root).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
    let weights = files.iter().filter(|path| path.extension() == Some(OsStr::new("safetensors")));
    let mut weights: Vec<&OsStr> = weights.filter_map(|path| path.file_name()).collect();
    weights.sort_unstable();
    let above = root.parent().filter(|above| exists(&above.join(INDEX)));
    match (above, &weights[..]) {
        (Some(above), _) => format!("{shown} is one part of the model {}; name that folder", above.display()),
        (None, _) if exists(&root.join("config.json")) => {
            format!("{shown} seems to be one part of a model, without the folder around it; {WANTED}")
        }
        (None, [file]) => format!("to use the checkpoint in it, name the file: {}", root.join(file).display()),
        (None, [first, ..]) => format!("to use a checkpoint in it, name one of its files, as {}", root.join(first).display()),
        (None, []) => WANTED.to_owned(),
    }
}

/// The latest snapshot of the model in a folder `models--owner--name` of the hub's cache.
fn snapshot(path: &Path) -> Option<PathBuf> {
    let snapshots = std::fs::read_dir(path.join("snapshots")).ok()?.flatten();
    let whole = snapshots.map(|entry| entry.path()).filter(|folder| exists(&folder.join(INDEX)));
    whole.max_by_key(|folder| folder.metadata().and_then(|about| about.modified()).ok())
}

/// The name `owner/model` of a repository, if a path may be one.
fn repository(path: &Path) -> Option<&str> {
    let text = path.to_str()?;
    let (owner, name) = text.split_once('/')?;
    let is_word = |word: &str| {
        !word.is_empty() && !word.starts_with('.') && word.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
    };
    (is_word(owner) && is_word(name) && !exists(Path::new(owner))).then_some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_without_an_index_is_told_by_what_it_has() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("model");
        let refused = |path: &Path| {
            let error = check_index(path).unwrap_err();
            assert!(error.is_bad_input() && error.to_string().contains("model_index.json: No such file"), "{error}");
            error.to_string()
        };
        assert!(refused(&root).contains("a model is a folder in diffusers layout"));
        let hub = refused(Path::new("stabilityai/stable-diffusion-xl-base-1.0"));
        assert!(hub.contains("hf download stabilityai/stable-diffusion-xl-base-1.0 --local-dir"), "{hub}");
        std::fs::create_dir_all(root.join("unet")).unwrap();
        assert!(refused(&root).contains("text_encoder_2, tokenizer"));
        std::fs::write(root.join("b.safetensors"), b"").unwrap();
        assert!(refused(&root).contains("model/b.safetensors"));
        std::fs::write(root.join("a.safetensors"), b"").unwrap();
        assert!(refused(&root).contains("one of its files, as") && refused(&root).contains("model/a.safetensors"));
        std::fs::write(root.join("config.json"), b"{}").unwrap();
        assert!(refused(&root).contains("one part of a model, without the folder around it"));
        std::fs::write(root.join("model_index.json"), b"{}").unwrap();
        check_index(&root).unwrap();
        assert!(refused(&root.join("unet")).contains("is one part of the model"));
    }

    #[test]
    fn all_missing_files_are_in_one_message() {
        let folder = tempfile::tempdir().unwrap();
        let wanted = ["vae/config.json", "unet/config.json", "scheduler/scheduler_config.json"].map(PathBuf::from);
        std::fs::create_dir_all(folder.path().join("unet")).unwrap();
        std::fs::write(folder.path().join("unet/config.json"), b"{}").unwrap();
        let error = check_files(folder.path(), &wanted).unwrap_err().to_string();
        assert!(
            error.contains("vae/config.json, scheduler/scheduler_config.json: No such file") && !error.contains("unet"),
            "{error}"
        );
        check_files(folder.path(), &wanted[1..2]).unwrap();
    }
}
