//! The configs inside of the program.

use std::path::Path;

use super::{files, is_on_disk, short};

/// A config of `configs/`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ShippedConfig {
    /// Its name: the path in `configs/` without `.yaml`. Those of the bundled model begin with
    /// `emoji/`, the others are for SDXL.
    pub name: &'static str,
    /// Its path in the repository, which names it in messages.
    pub path: &'static str,
    /// Its content.
    pub yaml: &'static str,
}

impl ShippedConfig {
    /// Whether the config is for the bundled model and not for SDXL.
    #[must_use]
    pub fn is_for_bundled(&self) -> bool {
        self.name.starts_with("emoji/")
    }

    /// The effect of the config, in the words of the first line of its head comment.
    #[must_use]
    pub fn summary(&self) -> &'static str {
        let comments = self.yaml.lines().map_while(|line| line.strip_prefix('#')).map(str::trim);
        comments.filter(|line| !line.starts_with("yaml-language-server")).find(|line| !line.is_empty()).unwrap_or_default()
    }
}

/// All configs: those for SDXL, then those of the bundled model, each in the order of their names.
pub fn configs() -> impl Iterator<Item = ShippedConfig> {
    let all = || files::configs().iter().map(|(path, yaml)| ShippedConfig { name: name(path), path, yaml });
    all().filter(|config| !config.is_for_bundled()).chain(all().filter(ShippedConfig::is_for_bundled))
}

/// The config of a name: `squeeze-3bits`, `emoji/squeeze-3bit-gs16`, or its path in the repository.
#[must_use]
pub fn config(path: &Path) -> Option<ShippedConfig> {
    let asked = name(path.to_str()?);
    configs().find(|config| config.name == asked)
}

/// The config that `path` stands for, unless it is a file on the disk.
#[must_use]
pub fn config_for(path: &Path) -> Option<ShippedConfig> {
    config(path).filter(|_| !is_on_disk(path))
}

fn name(path: &str) -> &str {
    short(path, "configs/", ".yaml")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_the_path_in_configs_or_in_the_repository() {
        for (asked, path) in [
            ("squeeze-3bits", "configs/squeeze-3bits.yaml"),
            ("squeeze-3bits.yaml", "configs/squeeze-3bits.yaml"),
            ("configs/squeeze-3bits.yaml", "configs/squeeze-3bits.yaml"),
            // Both folders have a config of this name: without a folder it is SDXL's.
            ("squeeze-s40-4bit-gs16", "configs/squeeze-s40-4bit-gs16.yaml"),
            ("emoji/squeeze-s40-4bit-gs16", "configs/emoji/squeeze-s40-4bit-gs16.yaml"),
            ("configs/emoji/squeeze-s40-4bit-gs16", "configs/emoji/squeeze-s40-4bit-gs16.yaml"),
        ] {
            assert_eq!(config(asked.as_ref()).map(|config| config.path), Some(path), "{asked}");
        }
        for other in ["", "emoji", "configs", "/configs/squeeze-3bits.yaml", "kmeans-4bit", "../configs/squeeze-3bits.yaml"] {
            assert_eq!(config(other.as_ref()), None, "{other}");
        }
    }

    #[test]
    fn every_config_says_its_effect_in_one_line() {
        let first = config("dense-4bit".as_ref()).unwrap();
        assert_eq!(first.summary(), "4 bits a weight, one palette for each weight tensor.");
        for config in configs() {
            let summary = config.summary();
            assert!(summary.len() > 20 && summary.ends_with(['.', ')']), "{}: {summary}", config.path);
        }
    }
}
