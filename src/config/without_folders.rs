//! Configs as they are recorded in results, which leave the machine.

use std::path::{Path, PathBuf};

use super::prompts::Prompts;
use super::{ModelSection, RunConfig};

impl RunConfig {
    /// The config with the name of each file in the place of its path. The folders of a user are
    /// nobody else's business, and equal models in two folders are to give equal results.
    #[must_use]
    pub fn without_folders(&self) -> RunConfig {
        let mut config = self.clone();
        let ModelSection { path, base, vae, loras, .. } = &mut config.model;
        [path, base, vae].into_iter().flatten().for_each(keep_name);
        loras.iter_mut().for_each(|lora| keep_name(&mut lora.path));
        [&mut config.calibration.samples, &mut config.calibration.captions].into_iter().flatten().for_each(keep_name);
        let tuning = config.tune.as_mut().and_then(|tune| tune.prompts.as_mut());
        let search = config.budget.as_mut().and_then(|budget| budget.search.as_mut()).map(|search| &mut search.prompts);
        for prompts in [Some(&mut config.calibration.prompts), tuning, search].into_iter().flatten() {
            if let Prompts::File(path) = prompts {
                keep_name(path);
            }
        }
        config
    }
}

fn keep_name(path: &mut PathBuf) {
    *path = file_name(path);
}

/// The name of a file or folder without the folders above it.
#[must_use]
pub fn file_name(path: &Path) -> PathBuf {
    // A path such as `..` has no name of its own.
    let name = path.file_name().map(PathBuf::from);
    name.or_else(|| path.canonicalize().ok()?.file_name().map(PathBuf::from)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_keep_their_names_and_lose_their_folders() {
        let yaml = b"model: {path: /home/jane/sdxl/, vae: a/vae.safetensors, loras: ['b/c.safetensors:0.5']}\n\
            calibration: {prompts: /home/jane/p.txt, captions: /home/jane/c.txt}\n\
            palettize: {global_config: {n_bits: 4}}\ntune: {prompts: ../jane/t.txt}\n";
        let config = RunConfig::parse("c.yaml".as_ref(), yaml).unwrap();
        let text = config.without_folders().to_json().to_string();
        for name in ["\"sdxl\"", "\"vae.safetensors\"", "\"c.safetensors:0.5\"", "\"p.txt\"", "\"c.txt\"", "\"t.txt\""] {
            assert!(text.contains(name), "{name}: {text}");
        }
        assert!(!text.contains('/') && !text.contains("jane"), "{text}");
        assert_eq!(file_name("..".as_ref()), Path::new("..").canonicalize().unwrap().file_name().unwrap());
    }
}
