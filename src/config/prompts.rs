//! Prompts: one by one, in lists and in files.

use std::path::{Path, PathBuf};

use serde::Serialize;
use squeeze_base::error::{Error, Result};
use squeeze_base::input::{self, Limit, prompt_of_length};
use squeeze_base::number;
use squeeze_base::shorten::path_as_text;

use super::fields::{text, texts};
use super::mistake::{Mistakes, nearest};
use super::tree::{Node, Value};
use super::unshipped::unshipped;
use crate::shipped;

/// Prompts, or a file of prompts.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Prompts {
    /// A file for [`read_prompts`]: a relative path starts at the current folder, and where no file
    /// is there, it may name prompts in the program.
    File(#[serde(serialize_with = "path_as_text")] PathBuf),
    /// The prompts themselves; at least one.
    List(Vec<String>),
}

/// The most prompts of a run. All of them are encoded; the default is 512 captions.
const PROMPTS: usize = 100_000;

/// The complaint about a number of prompts that is too large.
fn too_many(prompts: usize) -> Option<String> {
    let count = |number: usize| number::count(number as u64);
    (prompts > PROMPTS).then(|| format!("has {} prompts; at most {}", count(prompts), count(PROMPTS)))
}

/// Reads a file with one prompt a line: a file on the disk, or where there is none of that name, a
/// [shipped](crate::shipped) one. Blank lines are skipped, and so are lines that begin with `#`.
///
/// # Errors
/// [`Error::Read`]; [`Error::BadFile`] if it is not a regular file, is larger than 16 MiB or not
/// UTF-8, has no prompt in it, more than 100,000 of them, or one of more than 64 KiB.
pub fn read_prompts(path: &Path) -> Result<Vec<String>> {
    if let Some(shipped) = shipped::prompts_for(path) {
        tracing::info!("{}: read from the program", shipped.path);
        return of_text(shipped.path.as_ref(), shipped.text);
    }
    let text = input::read_text(path, Limit::PROMPTS).map_err(|error| unknown(path, error))?;
    of_text(path, &text)
}

/// The error about prompts that are neither a file nor shipped, with the name that was probably
/// meant.
fn unknown(path: &Path, error: Error) -> Error {
    let meant = |name: &str| nearest(name, shipped::prompts().map(|prompts| prompts.name));
    let names: Vec<&str> = shipped::prompts().map(|prompts| prompts.name).collect();
    let absent = format!("the program's own prompts are {}", names.join(", "));
    unshipped(path, error, ("calibration/", ".txt"), meant, &absent)
}

/// The prompts in the text of a file, which `path` names in errors.
fn of_text(path: &Path, text: &str) -> Result<Vec<String>> {
    // Editors on Windows put a byte order mark in front, which is in the middle once files are
    // joined. Old Macs end lines with CR alone.
    let lines = text.split(['\n', '\r']).map(|line| line.trim_matches(|c: char| c.is_whitespace() || c == '\u{feff}'));
    let prompts: Vec<&str> = lines.filter(|line| !line.is_empty() && !line.starts_with('#')).collect();
    if let Some(problem) = too_many(prompts.len()) {
        return Err(Error::bad_file(path, problem));
    }
    for (number, prompt) in (1..).zip(&prompts) {
        prompt_of_length(&format!("prompt {number}"), prompt).map_err(|problem| Error::bad_file(path, problem))?;
    }
    if prompts.is_empty() {
        return Err(Error::bad_file(path, "no prompts in it (one a line is expected)"));
    }
    Ok(prompts.into_iter().map(str::to_owned).collect())
}

impl Prompts {
    /// The prompts in a node that the key's kind has accepted. Entries that are no text are left
    /// out: [`check`] reports them.
    pub(super) fn of(node: &Node) -> Self {
        match &node.value {
            Value::List(prompts) => Prompts::List(prompts.iter().filter_map(|node| text(node).ok()).map(str::to_owned).collect()),
            Value::Text(path) => Prompts::File(path.into()),
            Value::Null | Value::Boolean(_) | Value::Integer(_) | Value::Number(_) | Value::Mapping(_) => {
                unreachable!("the kind of `prompts` is text or a list")
            }
        }
    }

    /// The prompts, read from their file if they are in one.
    ///
    /// # Errors
    /// Fails as [`read_prompts`] does.
    pub fn load(&self) -> Result<Vec<String>> {
        match self {
            Prompts::File(path) => read_prompts(path),
            Prompts::List(prompts) => Ok(prompts.clone()),
        }
    }
}

/// Checks each prompt of a list.
pub(super) fn check(node: &Node, mistakes: &mut Mistakes<'_>) {
    let Value::List(list) = &node.value else { return };
    let prompts = texts("prompts", list, mistakes);
    if let Some(problem) = too_many(prompts.len()) {
        mistakes.add(node.position, format!("`prompts` {problem}"));
    }
    for (number, (prompt, position)) in (1..).zip(&prompts) {
        if let Err(problem) = prompt_of_length(&format!("prompt {number}"), prompt) {
            mistakes.add(*position, problem);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_that_are_too_long_or_too_many_are_refused_by_number() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("prompts.txt");
        let refused = |content: String| {
            std::fs::write(&path, content).unwrap();
            let why = read_prompts(&path).unwrap_err();
            assert!(why.is_bad_input());
            why.to_string()
        };
        let long = refused(format!("a cat\n\n# said\na dog\n{}\n", "x".repeat(10 << 20)));
        assert!(long.contains("prompt 3 has 10,485,760 bytes; at most 64 KiB (it begins `xxx"), "{long}");
        assert!(long.len() < 300, "{long}");
        let many = refused("a\n".repeat(PROMPTS + 1));
        assert!(many.contains("has 100,001 prompts; at most 100,000"), "{many}");
        std::fs::write(&path, format!("\u{feff}a cat\r\n{}\r\n", "é".repeat(input::PROMPT_BYTES / 2))).unwrap();
        assert_eq!(read_prompts(&path).unwrap().len(), 2);
    }
}
