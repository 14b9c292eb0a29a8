//! The files inside of the program: configs, prompts and the bundled model. With them the program
//! runs without a checkout of its repository.
//!
//! A shipped file is named as in the repository, or shorter: `configs/squeeze-3bits.yaml` is
//! `squeeze-3bits` too, `calibration/judge.txt` is `judge`, and `models/emoji-sdxl` is
//! `emoji-sdxl`. A file on the disk wins over a shipped one of its name. A folder does not count as
//! a config or as prompts: results are often put into a folder with the name of their config.

mod configs;
mod model;
mod prompts;

use std::path::Path;

pub use configs::{ShippedConfig, config, config_for, configs};
pub use model::{BUNDLED, bundled_unet, is_bundled, unpack};
pub use prompts::{ShippedPrompts, prompts, prompts_for};

/// The lists that `build.rs` makes of the repository's folders.
mod files {
    include!(concat!(env!("OUT_DIR"), "/shipped.rs"));

    /// The configs: paths in the repository, and contents.
    pub(super) fn configs() -> &'static [(&'static str, &'static str)] {
        CONFIGS
    }

    /// The files of prompts: paths in the repository, and contents.
    pub(super) fn prompts() -> &'static [(&'static str, &'static str)] {
        PROMPTS
    }

    /// The files of the bundled model: paths in its folder, and contents.
    pub(super) fn model() -> &'static [(&'static str, &'static [u8])] {
        MODEL
    }

    /// A hash of the bundled model, 16 hex digits.
    pub(super) fn model_id() -> &'static str {
        MODEL_ID
    }
}

/// The short name of a path: without `folder`, which ends with a slash, and without `extension`.
fn short<'a>(path: &'a str, folder: &str, extension: &str) -> &'a str {
    let path = path.strip_prefix(folder).unwrap_or(path);
    path.strip_suffix(extension).unwrap_or(path)
}

/// Whether a file, or something else that is no folder, is on the disk under this name.
fn is_on_disk(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|there| !there.is_dir())
}
