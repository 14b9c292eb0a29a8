//! The one error type of the library.

mod bug;
mod mistake;
mod torch;

use std::backtrace::Backtrace;
use std::fmt::Display;
use std::io;
use std::path::{Path, PathBuf};

pub use bug::Bug;
pub use mistake::{Mistake, Place};

/// The result of everything in this library that can fail.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A failure, with the facts that a user needs to mend it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file or folder could not be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file or folder.
        path: PathBuf,
        /// The operating system's error.
        source: io::Error,
    },
    /// A file or folder could not be written.
    #[error("cannot write {}", path.display())]
    Write {
        /// The file or folder.
        path: PathBuf,
        /// The operating system's error.
        source: io::Error,
    },
    /// A file whose content is damaged or of another format than expected.
    #[error("{}: {problem}", path.display())]
    BadFile {
        /// The file.
        path: PathBuf,
        /// The damage, or the difference from the expected format.
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
        /// The parser's error, with line and column.
        source: serde_json::Error,
    },
    /// A key of a `config.json` with a wrong value, or with one that asks for a computation that is
    /// not implemented.
    #[error("{}: `{key}` {problem}", path.display())]
    ConfigKey {
        /// The config file.
        path: PathBuf,
        /// The key.
        key: String,
        /// The problem with its value.
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
        /// The tensors by name, and the problem with each.
        problem: String,
    },
    /// An argument that cannot be honoured: the caller's mistake.
    #[error("{0}")]
    Argument(String),
    /// A tensor, weight, mask or list of another shape than its use needs.
    #[error("{what} has the shape {found:?}; {expected} is expected")]
    Shape {
        /// The thing, as "the input".
        what: String,
        /// Its shape; of a list, its length.
        found: Vec<i64>,
        /// The shape that is needed, as "[.., 640]".
        expected: String,
    },
    /// A number outside its range.
    #[error("{what} is {found}; it must be {expected}")]
    Range {
        /// The number's meaning, as "the dampening".
        what: String,
        /// The number.
        found: String,
        /// The range, as "at least 0 and below 1".
        expected: String,
    },
    /// A call out of order, or one with objects that do not belong together.
    #[error("{0}")]
    State(String),
    /// A closeness to the dense model that no size reached, of those that were compressed to.
    #[error("{target} is not reached: the closest of {solves} solved sizes, {size}, has {best}; {remedy}")]
    Unreached {
        /// The closeness that was asked for, as "a UNet error of at most 0.5 %".
        target: String,
        /// How many sizes were compressed to.
        solves: usize,
        /// The size that came closest, as "1.02 GiB at 3.4 bits a weight".
        size: String,
        /// Its closeness, as "a UNet error of 0.62 %".
        best: String,
        /// What the user can change.
        remedy: String,
    },
    /// A failure that no input is to blame for: the system refused a request that every program may
    /// make.
    #[error("{0}")]
    Failed(String),
    /// A broken promise of this library, made by [`Error::internal`].
    #[error("internal error, please report it: {}", .0.problem)]
    Internal(Box<Bug>),
    /// libtorch refused an operation. The text is libtorch's: a message, then its C++ stack.
    #[error("libtorch: {}", first_line(.0))]
    Torch(String),
    /// A device whose memory is too small for an operation.
    #[error("{}", out_of_memory(step.as_deref(), text))]
    OutOfMemory {
        /// The step of the run that needed the memory, as "the Hessians of `mid_block`"; `None`
        /// until [`Error::during`] gives it.
        step: Option<String>,
        /// libtorch's text: a message, then its C++ stack.
        text: String,
    },
    /// A tensor with NaN or infinite values where finite ones are needed.
    #[error("{0}")]
    NotFinite(String),
    /// A Hessian without a Cholesky factor.
    #[error("the Hessian has no Cholesky factor, even with a dampening of {dampening}")]
    NotPositiveDefinite {
        /// The largest dampening that was tried.
        dampening: f64,
    },
    /// The run was asked to stop, and has.
    #[error("stopped; what is finished is kept")]
    Stopped,
    /// An early stop of a forward pass whose observer needs no further layers. The caller that gave
    /// the observer catches it.
    #[error("an observer has seen enough")]
    SeenEnough,
    /// A failure of the work on one layer.
    #[error("`{layer}`")]
    Layer {
        /// The layer's checkpoint name.
        layer: String,
        /// The failure.
        source: Box<Error>,
    },
}

impl Error {
    /// Whether the input is at fault (the CLI ends with 2) rather than the run (it ends with 1).
    #[must_use]
    pub fn is_bad_input(&self) -> bool {
        match self {
            Error::Read { .. }
            | Error::BadFile { .. }
            | Error::Json { .. }
            | Error::ConfigKey { .. }
            | Error::Config { .. }
            | Error::Tensors { .. }
            | Error::Argument(_)
            | Error::Shape { .. }
            | Error::Range { .. }
            | Error::State(_)
            | Error::Unreached { .. } => true,
            Error::Write { .. }
            | Error::Changed { .. }
            | Error::Failed(_)
            | Error::Internal(_)
            | Error::Torch(_)
            | Error::OutOfMemory { .. }
            | Error::NotFinite(_)
            | Error::NotPositiveDefinite { .. }
            | Error::Stopped
            | Error::SeenEnough => false,
            Error::Layer { source, .. } => source.is_bad_input(),
        }
    }

    /// The error; if it is an [`Error::OutOfMemory`] whose step is not known yet, with this step.
    #[must_use]
    pub fn during(mut self, step: &str) -> Error {
        let mut error = &mut self;
        while let Error::Layer { source, .. } = error {
            error = source;
        }
        if let Error::OutOfMemory { step: unknown @ None, .. } = error {
            *unknown = Some(step.to_owned());
        }
        self
    }

    /// The bug that this error reports, if it reports one.
    #[must_use]
    pub fn bug(&self) -> Option<&Bug> {
        let mut error = self;
        while let Error::Layer { source, .. } = error {
            error = source;
        }
        if let Error::Internal(bug) = error { Some(bug) } else { None }
    }

    /// An [`Error::Internal`] with the caller's backtrace. `problem` names the invariant that does
    /// not hold, as "no stage is loaded".
    pub fn internal(problem: impl Into<String>) -> Error {
        Error::Internal(Box::new(Bug { problem: problem.into(), backtrace: Backtrace::force_capture() }))
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

    /// An [`Error::Shape`] of a tensor or list.
    pub fn shape(what: impl Into<String>, found: impl Into<Vec<i64>>, expected: impl Into<String>) -> Error {
        Error::Shape { what: what.into(), found: found.into(), expected: expected.into() }
    }

    /// An [`Error::Range`].
    pub fn range(what: impl Into<String>, found: impl Display, expected: impl Into<String>) -> Error {
        Error::Range { what: what.into(), found: found.to_string(), expected: expected.into() }
    }

    /// An [`Error::BadFile`].
    pub fn bad_file(path: &Path, problem: impl Into<String>) -> Error {
        Error::BadFile { path: path.to_owned(), problem: problem.into() }
    }
}

/// The message without the C++ stack that libtorch appends to it.
fn first_line(text: &str) -> &str {
    text.split_once('\n').map_or(text, |(first, _)| first)
}

/// The message of an [`Error::OutOfMemory`]: what was asked for, and what to set.
fn out_of_memory(step: Option<&str>, text: &str) -> String {
    let what = step.map_or(String::new(), |step| format!(" for {step}"));
    let line = first_line(text);
    // After the sizes, libtorch lists processes and settings of its own.
    let sizes = line.find(" is free.").map_or(line, |end| &line[..end + " is free".len()]);
    format!(
        "the device's memory is too small{what}: {}; set another --memory-budget (a smaller one if other programs use the device, \
         a larger one if the run was given too little), and go on from the finished layers with --resume",
        sizes.trim_end_matches('.')
    )
}

fn one_a_line(mistakes: &[Mistake]) -> String {
    mistakes.iter().map(Mistake::to_string).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use std::backtrace::BacktraceStatus;

    use super::*;

    #[test]
    fn a_bug_asks_for_a_report_and_is_no_bad_input() {
        let error = Error::internal("no stage is loaded");
        assert_eq!(error.to_string(), "internal error, please report it: no stage is loaded");
        assert!(!error.is_bad_input());
        let bug = error.bug().expect("the error is internal");
        assert_eq!(bug.backtrace.status(), BacktraceStatus::Captured);
        let layer = Error::layer("conv_in")(error);
        assert!(!layer.is_bad_input() && layer.bug().is_some());
        assert!(Error::Argument("no such device".into()).bug().is_none());
    }

    #[test]
    fn a_device_without_memory_says_where_how_much_and_what_to_set() {
        let text = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 7.92 GiB of which 1.06 GiB is \
                    free. Process 4711 has 6.86 GiB memory in use. See PYTORCH_CUDA_ALLOC_CONF.\nException raised from malloc";
        let torch = |text: &str| Error::from(tch::TchError::Torch(text.into()));
        let error = Error::layer("conv_in")(torch(text)).during("the Hessians of `mid_block`").during("a later step");
        assert!(!error.is_bad_input());
        let Error::Layer { source, .. } = error else { panic!("the layer is gone") };
        assert_eq!(
            source.to_string(),
            "the device's memory is too small for the Hessians of `mid_block`: CUDA out of memory. Tried to allocate 2.00 GiB. \
             GPU 0 has a total capacity of 7.92 GiB of which 1.06 GiB is free; set another --memory-budget (a smaller one if \
             other programs use the device, a larger one if the run was given too little), and go on from the finished layers \
             with --resume"
        );
        for text in
            ["CUDA error: out of memory\nstack", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"]
        {
            assert!(torch(text).to_string().starts_with("the device's memory is too small: CUDA error: "), "{text}");
        }
        // The host's memory, and a stack that names the allocator's error.
        for text in ["DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes", "shapes\nout of memory"] {
            assert!(matches!(torch(text).during("a step"), Error::Torch(_)), "{text}");
        }
    }

    #[test]
    fn an_error_of_libtorch_is_its_first_line() {
        let error = tch::Tensor::zeros([2], (tch::Kind::Float, tch::Device::Cpu)).f_view([3]).unwrap_err();
        assert!(error.to_string().lines().count() > 1);
        let error = Error::from(error);
        assert!(!error.is_bad_input() && error.to_string().starts_with("libtorch: "));
        assert_eq!(error.to_string().lines().count(), 1);
    }
}
