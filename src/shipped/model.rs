//! The bundled model inside of the program: an SDXL of 8 million parameters.

use std::error::Error as _;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use sdxl_model::checkpoint::ConfigFile;
use squeeze_base::error::{Error, Result};
use squeeze_base::output::write_file;

use super::files;

/// The name of the bundled model.
pub const BUNDLED: &str = "emoji-sdxl";

/// The variable that names the folder of unpacked models.
const CACHE: &str = "SDXL_SQUEEZE_CACHE";

/// Whether `path` stands for the bundled model: `emoji-sdxl` or `models/emoji-sdxl`, where nothing
/// of that name is on the disk.
#[must_use]
pub fn is_bundled(path: &Path) -> bool {
    let names = [Path::new(BUNDLED).to_owned(), Path::new("models").join(BUNDLED)];
    names.iter().any(|name| name == path) && std::fs::symlink_metadata(path).is_err()
}

/// The config of the bundled model's UNet.
///
/// # Errors
/// [`Error::Json`] if it does not parse, which a test rules out.
pub fn bundled_unet() -> Result<ConfigFile> {
    const PATH: &str = "unet/config.json";
    let content = files::model().iter().find(|(name, _)| *name == PATH).map(|(_, content)| *content);
    ConfigFile::from_bytes(PATH.as_ref(), content.ok_or_else(|| Error::internal("the bundled model has no UNet"))?)
}

/// The folder of the bundled model. The model is written there first, in diffusers layout, unless
/// all of its files are there already; files are compared byte by byte, so that a damaged one is
/// mended. The folder is in `$SDXL_SQUEEZE_CACHE`, else in the user's folder for caches, and its
/// path has a hash of the model, so that programs with different models do not meet.
///
/// # Errors
/// [`Error::Failed`] if the environment names no folder, or the files cannot be written.
pub fn unpack() -> Result<PathBuf> {
    let variable = |name: &str| std::env::var_os(name);
    let Some(cache) = cache(variable) else {
        return Err(Error::Failed(format!(
            "the bundled model has to be unpacked, and neither HOME nor XDG_CACHE_HOME says where; set {CACHE} to a folder"
        )));
    };
    let folder = cache.join(files::model_id()).join(BUNDLED);
    match unpack_into(&folder) {
        Ok(()) => Ok(folder),
        Err(why) => {
            let cause = why.source().map_or(String::new(), |cause| format!(": {cause}"));
            Err(Error::Failed(format!("the bundled model: {why}{cause}; set {CACHE} to a folder that can be written")))
        }
    }
}

/// The folder of unpacked models, by the environment's variables.
fn cache(variable: impl Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    // A relative path would depend on the current folder; the standard for XDG's says to ignore it.
    let folder = |name: &str| variable(name).map(PathBuf::from).filter(|path| path.is_absolute());
    if let Some(own) = variable(CACHE).filter(|path| !path.is_empty()) {
        return Some(PathBuf::from(own));
    }
    let users = match std::env::consts::OS {
        "macos" => folder("HOME").map(|home| home.join("Library/Caches")),
        "windows" => folder("LOCALAPPDATA"),
        _ => folder("XDG_CACHE_HOME").or_else(|| folder("HOME").map(|home| home.join(".cache"))),
    };
    users.map(|users| users.join("sdxl-squeeze"))
}

fn unpack_into(folder: &Path) -> Result<()> {
    for (name, content) in files::model() {
        let path = folder.join(name);
        if std::fs::read(&path).is_ok_and(|there| there == *content) {
            continue;
        }
        let parent = path.parent().unwrap_or(folder);
        std::fs::create_dir_all(parent).map_err(Error::write(parent))?;
        write_file(&path, |file| file.write_all(content))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn damaged_files_are_mended_and_whole_ones_stay() {
        let folder = tempfile::tempdir().unwrap();
        let model = folder.path().join("deep/model");
        unpack_into(&model).unwrap();
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("models").join(BUNDLED);
        let weights = "unet/diffusion_pytorch_model.safetensors";
        for name in ["model_index.json", "README.md", "tokenizer_2/vocab.json", weights] {
            assert!(std::fs::read(model.join(name)).unwrap() == std::fs::read(source.join(name)).unwrap(), "{name}");
        }
        assert!(!model.join("train.py").exists() && !model.join("samples.png").exists());
        let changed = |name: &str| std::fs::metadata(model.join(name)).unwrap().modified().unwrap();
        let before = changed("model_index.json");
        std::fs::write(model.join(weights), b"cut short").unwrap();
        std::fs::remove_file(model.join("vae/config.json")).unwrap();
        unpack_into(&model).unwrap();
        assert_eq!(changed("model_index.json"), before);
        assert!(std::fs::read(model.join(weights)).unwrap() == std::fs::read(source.join(weights)).unwrap());
        assert!(model.join("vae/config.json").is_file());
        // A file in the place of a folder.
        let file = folder.path().join("file");
        std::fs::write(&file, b"").unwrap();
        let refused = unpack_into(&file.join("model")).unwrap_err().to_string();
        assert!(refused.starts_with("cannot write") && refused.contains("file/model"), "{refused}");
    }

    #[test]
    fn the_place_is_the_programs_own_variable_or_the_users_caches() {
        let place = |variables: &[(&str, &str)]| {
            let find = |name: &str| variables.iter().find(|(key, _)| *key == name).map(|(_, value)| OsString::from(value));
            cache(find).map(|path| path.to_string_lossy().into_owned())
        };
        let all = [("HOME", "/home/a"), ("XDG_CACHE_HOME", "/cache"), (CACHE, "own")];
        assert_eq!(place(&all).as_deref(), Some("own"));
        if cfg!(target_os = "linux") {
            assert_eq!(place(&all[..2]).as_deref(), Some("/cache/sdxl-squeeze"));
            assert_eq!(place(&[("HOME", "/home/a"), ("XDG_CACHE_HOME", "here")]).as_deref(), Some("/home/a/.cache/sdxl-squeeze"));
        }
        assert_eq!(place(&[("HOME", ""), (CACHE, "")]), None);
    }
}
