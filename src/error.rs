//! The one error type of the library.

use std::io;
use std::path::{Path, PathBuf};

use crate::config::Mistake;

/// The result of everything in this library that can fail.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong, each with what a user needs to mend it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file or folder could not be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file or folder.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// A file or folder could not be written.
    #[error("cannot write {}", path.display())]
    Write {
        /// The file or folder.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// A file's content is not what its name promises.
    #[error("{}: {problem}", path.display())]
    BadFile {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// A file that another program wrote to, or cut short, while it was read.
    #[error("{}: changed while the run was under way", path.display())]
    Changed {
        /// The file.
        path: PathBuf,
    },
    /// A JSON file that does not parse.
    #[error("{}: not valid JSON", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: serde_json::Error,
    },
    /// A key of a config.json that is wrong, or that asks for a computation that is not implemented.
    #[error("{}: `{key}` {problem}", path.display())]
    ConfigKey {
        /// The config file.
        path: PathBuf,
        /// The key.
        key: String,
        /// What is wrong with its value.
        problem: String,
    },
    /// A run config, or the flags that override it, with all their mistakes: one line each.
    #[error("{}", one_a_line(mistakes))]
    Config {
        /// At least one, in the order of the file.
        mistakes: Vec<Mistake>,
    },
    /// Tensors of a checkpoint that disagree with the architecture.
    #[error("{}: {problem}", path.display())]
    Tensors {
        /// The checkpoint.
        path: PathBuf,
        /// The tensors by name, and what is wrong with each.
        problem: String,
    },
    /// An argument that cannot be honoured.
    #[error("{0}")]
    Argument(String),
    /// What no input is to blame for: the system refused what every program may ask for, or the library broke a promise of its own.
    #[error("{0}")]
    Failed(String),
    /// libtorch refused an operation.
    #[error("libtorch: {}", first_line(.0))]
    Torch(#[from] tch::TchError),
    /// A tensor with NaN or infinite values where finite ones are needed.
    #[error("{0}")]
    NotFinite(String),
    /// A Hessian without a Cholesky factor.
    #[error("the Hessian has no Cholesky factor, even with a dampening of {dampening}")]
    NotPositiveDefinite {
        /// The most that was tried.
        dampening: f64,
    },
    /// The run was asked to stop, and has.
    #[error("stopped; what is finished is kept")]
    Stopped,
    /// An observer has seen all that it wanted of a forward, which need not go on. Whoever gave the observer catches it.
    #[error("an observer has seen enough")]
    SeenEnough,
    /// What went wrong with one layer.
    #[error("`{layer}`")]
    Layer {
        /// Its checkpoint name.
        layer: String,
        /// What went wrong.
        source: Box<Error>,
    },
}

impl Error {
    /// Whether the input is at fault (the CLI ends with 2) rather than the run (it ends with 1).
    pub fn is_bad_input(&self) -> bool {
        match self {
            Error::Read { .. }
            | Error::BadFile { .. }
            | Error::Json { .. }
            | Error::ConfigKey { .. }
            | Error::Config { .. }
            | Error::Tensors { .. }
            | Error::Argument(_) => true,
            Error::Write { .. }
            | Error::Changed { .. }
            | Error::Failed(_)
            | Error::Torch(_)
            | Error::NotFinite(_)
            | Error::NotPositiveDefinite { .. }
            | Error::Stopped
            | Error::SeenEnough => false,
            Error::Layer { source, .. } => source.is_bad_input(),
        }
    }

    /// For `map_err` on reading `path`.
    pub fn read(path: &Path) -> impl FnOnce(io::Error) -> Error {
        let path = path.to_owned();
        |source| Error::Read { path, source }
    }

    /// For `map_err` on writing `path`.
    pub fn write(path: &Path) -> impl FnOnce(io::Error) -> Error {
        let path = path.to_owned();
        |source| Error::Write { path, source }
    }

    /// For `map_err` on work on `layer`.
    pub fn layer(layer: &str) -> impl FnOnce(Error) -> Error {
        let layer = layer.to_owned();
        |source| Error::Layer { layer, source: Box::new(source) }
    }

    /// A [`Error::BadFile`].
    pub fn bad_file(path: &Path, problem: impl Into<String>) -> Error {
        Error::BadFile { path: path.to_owned(), problem: problem.into() }
    }
}

/// libtorch appends a C++ stack to its messages; people need the first line.
fn first_line(error: &tch::TchError) -> String {
    error.to_string().lines().next().unwrap_or_default().to_owned()
}

fn one_a_line(mistakes: &[Mistake]) -> String {
    mistakes.iter().map(Mistake::to_string).collect::<Vec<_>>().join("\n")
}
