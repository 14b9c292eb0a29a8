//! The bundled model, named in the place of a folder.

use std::path::PathBuf;

use sdxl_squeeze::Result;
use sdxl_squeeze::config::RunConfig;
use sdxl_squeeze::shipped;

/// The model at `path`. If that is the name of the bundled model, and no folder of that name is
/// there, the model is unpacked and its folder is returned.
///
/// # Errors
/// As [`shipped::unpack`].
pub(super) fn found(path: PathBuf) -> Result<PathBuf> {
    if shipped::is_bundled(&path) { shipped::unpack() } else { Ok(path) }
}

/// The config with its model found.
///
/// # Errors
/// As [`found`].
pub(super) fn in_config(mut config: RunConfig) -> Result<RunConfig> {
    config.model.path = config.model.path.map(found).transpose()?;
    Ok(config)
}
