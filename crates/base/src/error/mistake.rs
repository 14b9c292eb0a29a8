//! One mistake in a run config, and its place.

use std::fmt::{self, Display};
use std::path::PathBuf;

/// One mistake in a run config or in the flags that override it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mistake {
    /// The place of the wrong key or value.
    pub place: Place,
    /// The problem, in one line.
    pub problem: String,
}

impl Display for Mistake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Mistake { place, problem } = self;
        match place {
            Place::Default => f.write_str(problem),
            Place::File { .. } | Place::Flag(_) => write!(f, "{place}: {problem}"),
        }
    }
}

/// The place where a part of a run config was written.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Place {
    /// In a file; shown as `configs/x.yaml:3:5`.
    File {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: u64,
        /// The column in characters, from 1.
        column: u64,
    },
    /// On the command line: the flag and its value, as `--n-bits 5`.
    Flag(String),
    /// Nowhere: the value is a default.
    #[default]
    Default,
}

impl Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::File { path, line, column } => write!(f, "{}:{line}:{column}", path.display()),
            Place::Flag(flag) => f.write_str(flag),
            Place::Default => f.write_str("the defaults"),
        }
    }
}
