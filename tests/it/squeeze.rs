//! Runs of the program, with a full report if a run does not end as a test expects.

use std::ffi::{OsStr, OsString};
use std::fmt::{self, Display};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
#[cfg(unix)]
use std::time::{Duration, Instant};

use serde::de::DeserializeOwned;

use crate::support::{repo, squeezing};

/// A command of the program with its arguments.
#[derive(Debug, Clone)]
pub(crate) struct Squeeze {
    arguments: Vec<OsString>,
    variables: Vec<(&'static str, String)>,
    folder: PathBuf,
}

impl Squeeze {
    /// The subcommand `name`, run in the root of the repository.
    pub(crate) fn new(name: &str) -> Self {
        Squeeze { arguments: vec![name.into()], variables: Vec::new(), folder: repo("") }
    }

    /// Adds an argument.
    pub(crate) fn arg(mut self, argument: impl AsRef<OsStr>) -> Self {
        self.arguments.push(argument.as_ref().to_owned());
        self
    }

    /// Adds arguments.
    pub(crate) fn args<A: AsRef<OsStr>>(mut self, arguments: impl IntoIterator<Item = A>) -> Self {
        self.arguments.extend(arguments.into_iter().map(|argument| argument.as_ref().to_owned()));
        self
    }

    /// Adds a flag with its value.
    pub(crate) fn with(self, flag: &str, value: impl AsRef<OsStr>) -> Self {
        self.arg(flag).arg(value)
    }

    /// Adds `--config configs/NAME.yaml`.
    pub(crate) fn config(self, name: &str) -> Self {
        self.config_file(repo(&format!("configs/{name}.yaml")))
    }

    /// Sets an environment variable.
    pub(crate) fn env(mut self, name: &'static str, value: &str) -> Self {
        self.variables.push((name, value.to_owned()));
        self
    }

    /// Adds `--config FILE`.
    pub(crate) fn config_file(self, path: impl AsRef<Path>) -> Self {
        self.with("--config", path.as_ref())
    }

    /// Adds `--model FOLDER`.
    pub(crate) fn model(self, folder: impl AsRef<Path>) -> Self {
        self.with("--model", folder.as_ref())
    }

    /// Adds `--out PATH`.
    pub(crate) fn out(self, path: impl AsRef<Path>) -> Self {
        self.with("--out", path.as_ref())
    }

    /// Adds flags for `count` calibration samples. They are from pictures of the bundled model's
    /// prompts, drawn in `steps` steps.
    pub(crate) fn samples(self, count: usize, steps: usize) -> Self {
        let [count, steps] = [count, steps].map(|number| number.to_string());
        self.with("--prompts", repo("calibration/emoji.txt")).with("--calibration-nsamples", count).with("--steps", steps)
    }

    /// Runs in `folder` instead of the root of the repository.
    #[cfg(unix)]
    pub(crate) fn folder(mut self, folder: &Path) -> Self {
        self.folder = folder.to_owned();
        self
    }

    /// The command, which the test starts itself.
    pub(crate) fn command(&self) -> Command {
        let mut command = squeezing(&[]);
        command.args(&self.arguments).envs(self.variables.iter().cloned()).current_dir(&self.folder);
        command
    }

    /// Runs the command, which must end with the exit code `expected`.
    #[track_caller]
    pub(crate) fn ends_with(&self, expected: i32) -> Ended {
        let output = self.command().output().expect("the program can be started");
        let ended = Ended::new(self.clone(), &output);
        assert_eq!(output.status.code(), Some(expected), "{ended}");
        ended
    }

    /// Starts the command and discards its output.
    pub(crate) fn starts(&self) -> Child {
        self.command().stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("the program can be started")
    }

    /// Runs the command, which must succeed.
    #[track_caller]
    pub(crate) fn succeeds(&self) -> Ended {
        self.ends_with(0)
    }

    /// Runs the command, which must refuse its input in one line that contains all `parts`.
    #[track_caller]
    pub(crate) fn is_refused(&self, parts: &[&str]) -> Ended {
        self.ends_with(2).refuses(parts)
    }

    /// Like [`is_refused`](Self::is_refused), but the command is killed if it takes longer than
    /// `limit`.
    #[cfg(unix)]
    #[track_caller]
    pub(crate) fn is_refused_within(&self, limit: Duration, parts: &[&str]) -> Ended {
        let mut child = self.command().stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the program can be started");
        let begin = Instant::now();
        while child.try_wait().unwrap().is_none() {
            if begin.elapsed() > limit {
                child.kill().unwrap();
                panic!("{self:?} does not end");
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        let output = child.wait_with_output().unwrap();
        let ended = Ended::new(self.clone(), &output);
        assert_eq!(output.status.code(), Some(2), "{ended}");
        ended.refuses(parts)
    }

    /// Runs the shell script `script` in the command's folder. In the script, `"$0" "$@"` is the
    /// command. The script must end with the exit code `expected`.
    #[cfg(unix)]
    #[track_caller]
    pub(crate) fn in_shell(&self, script: &str, expected: i32) -> Ended {
        let mut shell = Command::new("bash");
        shell.args(["-c", script, env!("CARGO_BIN_EXE_sdxl-squeeze")]).args(&self.arguments);
        let output = shell.env("OMP_WAIT_POLICY", "PASSIVE").current_dir(&self.folder).output().expect("bash is there");
        let ended = Ended::new(self.clone(), &output);
        assert_eq!(output.status.code(), Some(expected), "{script}\n{ended}");
        ended
    }
}

/// A run that has ended.
#[derive(Debug)]
pub(crate) struct Ended {
    squeeze: Squeeze,
    status: String,
    /// The text on standard output.
    pub stdout: String,
    /// The text on standard error.
    pub stderr: String,
}

impl Ended {
    fn new(squeeze: Squeeze, output: &Output) -> Self {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Ended { squeeze, status: output.status.to_string(), stdout: text(&output.stdout), stderr: text(&output.stderr) }
    }

    /// Asserts that standard output or standard error contains each of `parts`.
    #[track_caller]
    pub(crate) fn says(&self, parts: &[&str]) -> &Self {
        for part in parts {
            assert!(self.stdout.contains(part) || self.stderr.contains(part), "`{part}` is missing\n{self}");
        }
        self
    }

    /// Asserts that there is one line with an error, which contains all `parts`.
    #[track_caller]
    fn refuses(self, parts: &[&str]) -> Self {
        let errors = self.stderr.lines().filter(|line| line.contains("error")).count();
        assert_eq!(errors, 1, "there is not one line with an error\n{self}");
        for part in parts {
            assert!(self.error_line().contains(part), "`{part}` is not in the error\n{self}");
        }
        self
    }

    /// The first line of standard error that contains an error.
    #[track_caller]
    pub(crate) fn error_line(&self) -> &str {
        self.stderr.lines().find(|line| line.contains("error")).unwrap_or_else(|| panic!("there is no error\n{self}"))
    }

    /// Standard output, then standard error.
    pub(crate) fn text(&self) -> String {
        format!("{}{}", self.stdout, self.stderr)
    }

    /// Standard output as JSON.
    #[track_caller]
    pub(crate) fn json<T: DeserializeOwned>(&self) -> T {
        serde_json::from_str(&self.stdout).unwrap_or_else(|why| panic!("standard output: {why}\n{self}"))
    }
}

impl Display for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Ended { squeeze: Squeeze { arguments, variables, folder }, status, stdout, stderr } = self;
        let command: Vec<String> = arguments.iter().map(|argument| argument.to_string_lossy().into_owned()).collect();
        writeln!(f, "command: sdxl-squeeze {}", command.join(" "))?;
        writeln!(f, "environment: {variables:?}")?;
        writeln!(f, "folder: {}", folder.display())?;
        writeln!(f, "ended with: {status}")?;
        writeln!(f, "--- standard output\n{stdout}")?;
        writeln!(f, "--- standard error\n{stderr}")
    }
}

/// Variables that make the libraries use the instructions of processors without AVX-512.
const NARROWER: [(&str, &str); 3] =
    [("ONEDNN_MAX_CPU_ISA", "AVX2"), ("MKL_CBWR", "AVX2,STRICT"), ("ATEN_CPU_CAPABILITY", "avx2")];

/// Asserts that a command writes equal bytes on each number of threads, both with the instructions
/// of this processor and with those of a narrower one. `result` takes the bytes that a run wrote,
/// which the next run replaces.
#[track_caller]
pub(crate) fn same_on_all_threads(threads: &[&str], squeeze: &Squeeze, mut result: impl FnMut() -> Vec<u8>) {
    for narrower in [&[][..], &NARROWER] {
        let mut on = |threads: &str| {
            let run = squeeze.clone().arg("--overwrite").env("OMP_NUM_THREADS", threads).env("RAYON_NUM_THREADS", threads);
            narrower.iter().fold(run, |run, (name, value)| run.env(name, value)).succeeds();
            result()
        };
        let first = on(threads[0]);
        for number in &threads[1..] {
            assert!(on(number) == first, "other bytes on {number} threads than on {} ({narrower:?})", threads[0]);
        }
    }
}
