//! Reads a config: parses it, applies the command line's edits and reports all mistakes.

use std::path::Path;

use squeeze_base::error::{Error, Result};
use squeeze_base::input::{self, Limit};

use super::edit::{self, Edit};
use super::mistake::{Mistakes, nearest};
use super::run_config::{Remarks, RunConfig};
use super::tree::{self, Value};
use super::unshipped::unshipped;
use crate::shipped;

impl RunConfig {
    /// Reads a config.
    ///
    /// # Errors
    /// As [`read_edited`](Self::read_edited).
    pub fn read(path: &Path) -> Result<RunConfig> {
        RunConfig::read_edited(path, &[])
    }

    /// Reads a config that flags of the command line edit: a file, or where there is none of that
    /// name, a [shipped](crate::shipped) config.
    ///
    /// # Errors
    /// [`Error::Read`]; [`Error::BadFile`] if it is not a regular file of at most 1 MiB;
    /// [`Error::Config`] with all mistakes of file and flags.
    pub fn read_edited(path: &Path, edits: &[Edit]) -> Result<RunConfig> {
        if let Some(config) = shipped::config_for(path) {
            return RunConfig::parse_edited(config.path.as_ref(), config.yaml.as_bytes(), edits);
        }
        let bytes =
            input::read(path, Limit::RUN_CONFIG).map_err(|error| renamed(path).unwrap_or_else(|| unknown(path, error)))?;
        RunConfig::parse_edited(path, &bytes, edits)
    }

    /// Reads a config from memory; `path` names it in mistakes.
    ///
    /// # Errors
    /// As [`parse_edited`](Self::parse_edited).
    pub fn parse(path: &Path, bytes: &[u8]) -> Result<RunConfig> {
        RunConfig::parse_edited(path, bytes, &[])
    }

    /// Reads a config from memory that flags of the command line edit; `path` names it in mistakes.
    ///
    /// # Errors
    /// [`Error::Config`] with all mistakes. A mistake of YAML's syntax is the only one that is
    /// reported.
    pub fn parse_edited(path: &Path, bytes: &[u8], edits: &[Edit]) -> Result<RunConfig> {
        let mut mistakes = Mistakes::new(path, edits.iter().map(Edit::shown).collect());
        let config = match tree::parse(bytes) {
            Ok(tree::Node { value: Value::Null, position }) => {
                mistakes.add(position, "the config is empty; it needs `prune`, `palettize` or both");
                RunConfig::default()
            }
            Ok(mut root) => {
                edit::apply(&mut root, edits, &mut mistakes);
                RunConfig::from_tree(&root, &mut mistakes)
            }
            Err((position, problem)) => {
                mistakes.add(position, problem);
                RunConfig::default()
            }
        };
        Ok(RunConfig { remarks: Remarks(mistakes.into_remarks()?), ..config })
    }
}

/// The error about a config that is read under a former name: the `joint-*` ones of `configs/`,
/// which run the sequential solver, are called `tutorial-*`.
fn renamed(path: &Path) -> Option<Error> {
    let recipe = path.file_name()?.to_str()?.strip_prefix("joint-")?;
    let present = path.with_file_name(format!("tutorial-{recipe}"));
    let is_there = present.is_file() || shipped::config_for(&present).is_some();
    (std::fs::symlink_metadata(path).is_err() && is_there).then(|| {
        let (path, present) = (path.display(), present.display());
        Error::Argument(format!("{path} has been renamed: it is {present} now, as it runs the sequential solver"))
    })
}

/// The error about a config that is neither a file nor shipped, with the name that was probably
/// meant.
fn unknown(path: &Path, error: Error) -> Error {
    let meant = |name: &str| {
        let of_bundled = format!("emoji/{name}");
        let twin = shipped::configs().find(|config| config.name == of_bundled).map(|config| config.name);
        twin.or_else(|| nearest(name, shipped::configs().map(|config| config.name)))
    };
    unshipped(
        path,
        error,
        ("configs/", ".yaml"),
        meant,
        "no config of this name is in the program; `sdxl-squeeze configs` lists them",
    )
}
