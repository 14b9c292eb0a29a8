//! Files of prompts.

use std::path::Path;

use super::sections::Prompts;
use crate::error::{Error, Result};

/// Prompts are a few hundred bytes each; this bounds what is read of a wrong file.
const MAX_BYTES: u64 = 16 << 20;

/// Reads a file with one prompt a line. Blank lines are skipped, and so are lines that begin with `#`.
///
/// # Errors
/// If it cannot be read, is larger than 16 MiB or not UTF-8, or has no prompt in it.
pub fn read_prompts(path: &Path) -> Result<Vec<String>> {
    let size = std::fs::metadata(path).map_err(Error::read(path))?.len();
    if size > MAX_BYTES {
        return Err(Error::bad_file(path, format!("{size} bytes are too many for a file of prompts")));
    }
    let bytes = std::fs::read(path).map_err(Error::read(path))?;
    let text = String::from_utf8(bytes)
        .map_err(|why| Error::bad_file(path, format!("not UTF-8 text from byte {}", why.utf8_error().valid_up_to())))?;
    // Editors on Windows put a byte order mark in front.
    let lines = text.trim_start_matches('\u{feff}').lines().map(str::trim);
    let prompts: Vec<String> = lines.filter(|line| !line.is_empty() && !line.starts_with('#')).map(str::to_owned).collect();
    if prompts.is_empty() { Err(Error::bad_file(path, "no prompts in it (one a line is expected)")) } else { Ok(prompts) }
}

impl Prompts {
    /// The prompts, read from their file if they are in one.
    ///
    /// # Errors
    /// Those of [`read_prompts`].
    pub fn load(&self) -> Result<Vec<String>> {
        match self {
            Prompts::File(path) => read_prompts(path),
            Prompts::List(prompts) => Ok(prompts.clone()),
        }
    }
}
