//! The flags that edit a config. The library declares them, each with the key that it edits.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use clap::{Arg, ArgAction, ArgMatches, Command, FromArgMatches, value_parser};
use sdxl_squeeze::config::{ConfigFlag, Edit, RunConfig, flags};
use sdxl_squeeze::pipeline::PipelineFolder;
use sdxl_squeeze::shipped::{self, ShippedConfig};
use sdxl_squeeze::{Error, Result};

use super::bundled;

/// The edits that the command line makes to every config it names.
#[derive(Debug, Clone)]
pub(super) struct Edits(Vec<Edit>);

impl Edits {
    /// Whether there are none.
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The first of the flags `names` that is given.
    pub(super) fn first_of<'n>(&self, names: &[&'n str]) -> Option<&'n str> {
        names.iter().copied().find(|name| self.0.iter().any(|edit| edit.flag() == *name))
    }

    /// Reads a config and edits it.
    pub(super) fn config(&self, path: &Path) -> Result<RunConfig> {
        self.config_with(path, None)
    }

    /// Reads a config and edits it, with a further edit.
    pub(super) fn config_with(&self, path: &Path, further: Option<Edit>) -> Result<RunConfig> {
        bundled::in_config(RunConfig::read_edited(path, &self.and(further))?)
    }

    /// Reads a config of the program and edits it, with a further edit.
    pub(super) fn shipped_with(&self, config: ShippedConfig, further: Option<Edit>) -> Result<RunConfig> {
        bundled::in_config(RunConfig::parse_edited(config.path.as_ref(), config.yaml.as_bytes(), &self.and(further))?)
    }

    fn and(&self, further: Option<Edit>) -> Vec<Edit> {
        self.0.iter().cloned().chain(further).collect()
    }
}

/// The pipeline that a config names.
pub(super) fn model_of(config: &RunConfig) -> Result<PipelineFolder> {
    PipelineFolder::open_files(&config.model.files(model_path(config)?))
}

/// The path of the model that a config names.
pub(super) fn model_path(config: &RunConfig) -> Result<PathBuf> {
    let missing = || {
        Error::Argument(format!(
            "which model? give --model DIR, or model: {{path: DIR}} in the config; --model {} is the bundled one",
            shipped::BUNDLED
        ))
    };
    config.model.path.clone().ok_or_else(missing)
}

impl clap::Args for Edits {
    fn augment_args(command: Command) -> Command {
        command.args(flags().map(arg))
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

fn arg(flag: ConfigFlag) -> Arg {
    let ConfigFlag { name, argument, help, former, repeated, switch } = flag;
    let arg = Arg::new(name)
        .long(name)
        .value_name(argument)
        .help(help)
        .help_heading("In the place of the config's values")
        .hide(former)
        .action(if repeated { ArgAction::Append } else { ArgAction::Set })
        .allow_negative_numbers(true)
        .value_parser(value_parser!(OsString));
    if switch { arg.num_args(0..=1).require_equals(true).default_missing_value("true") } else { arg }
}

impl FromArgMatches for Edits {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let values =
            |flag: ConfigFlag| matches.get_many::<OsString>(flag.name).into_iter().flatten().map(move |value| (flag.name, value));
        let given = flags().flat_map(values);
        let edits = given.map(|(name, argument)| Edit::new(name, argument).expect("the library declares its flags"));
        Ok(Edits(edits.collect()))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}
