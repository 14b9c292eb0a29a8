//! The prompts inside of the program.

use std::path::Path;

use super::{files, is_on_disk, short};

/// A file of `calibration/`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ShippedPrompts {
    /// Its name: that of the file without `.txt`.
    pub name: &'static str,
    /// Its path in the repository, which names it in messages.
    pub path: &'static str,
    /// Its content.
    pub text: &'static str,
}

/// All files of prompts, in the order of their names.
pub fn prompts() -> impl Iterator<Item = ShippedPrompts> {
    files::prompts().iter().map(|(path, text)| ShippedPrompts { name: name(path), path, text })
}

/// The prompts that `path` stands for, unless it is a file on the disk: `judge`, `judge.txt` or
/// `calibration/judge.txt`.
#[must_use]
pub fn prompts_for(path: &Path) -> Option<ShippedPrompts> {
    let asked = name(path.to_str()?);
    prompts().find(|prompts| prompts.name == asked).filter(|_| !is_on_disk(path))
}

fn name(path: &str) -> &str {
    short(path, "calibration/", ".txt")
}
