//! Runs of the program with their time and memory.

use std::fs::File;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitStatus};
use std::time::{Duration, Instant};

/// How a child ended.
#[derive(Debug)]
pub(crate) struct Ended {
    /// The exit code or the signal.
    pub status: ExitStatus,
    /// The text on standard output, followed by that on standard error.
    pub said: String,
    /// The processor time of all threads in seconds.
    pub seconds: f64,
    /// The peak resident memory in bytes.
    pub peak: u64,
    /// Whether the child exceeded the limit and was killed.
    pub hung: bool,
}

impl Ended {
    /// The exit code; `None` if a signal ended the child.
    pub(crate) fn code(&self) -> Option<i32> {
        self.status.code()
    }

    /// The reason why this is not a proper refusal of bad input. A refusal has exit code 2, one
    /// line, no panic, and takes little time and memory.
    pub(crate) fn fault(&self) -> Option<String> {
        const SECONDS: f64 = 5.0;
        const BYTES: u64 = 1 << 30;
        let errors = self.said.lines().filter(|line| line.contains("error")).count();
        let fault = match self {
            _ if self.hung => "did not end".to_owned(),
            _ if self.code() != Some(2) => format!("ended with {}, not with exit code 2", self.status),
            _ if self.said.contains("panicked") || self.said.contains("internal error") => "a panic".to_owned(),
            _ if errors != 1 => format!("{errors} lines with errors instead of one"),
            _ if self.said.len() > 4096 => format!("{} bytes of messages", self.said.len()),
            _ if self.seconds > SECONDS => format!("took {:.1} s of processor time", self.seconds),
            _ if self.peak > BYTES => format!("took {} MiB of memory", self.peak >> 20),
            _ => return None,
        };
        Some(fault)
    }
}

/// Runs `command` to its end, or kills it after `limit`.
#[expect(clippy::zombie_processes, reason = "wait4 waits for the child, as the standard library does not tell what it used")]
pub(crate) fn run(mut command: Command, limit: Duration) -> Ended {
    let folder = tempfile::tempdir().unwrap();
    let [out, err] = ["out", "err"].map(|name| folder.path().join(name));
    command.stdin(std::process::Stdio::null()).stdout(File::create(&out).unwrap()).stderr(File::create(&err).unwrap());
    let child = command.spawn().unwrap();
    let begin = Instant::now();
    let mut hung = false;
    let (status, usage) = loop {
        if let Some(found) = wait(child.id()) {
            break found;
        }
        if !hung && begin.elapsed() > limit {
            hung = true;
            // SAFETY: the child has not been waited for, so its id is not in use by another
            // process.
            unsafe { libc::kill(child.id() as i32, libc::SIGKILL) };
        }
        std::thread::sleep(Duration::from_millis(2));
    };
    let seconds = |time: libc::timeval| time.tv_sec as f64 + time.tv_usec as f64 / 1e6;
    // Messages may quote names that are not UTF-8.
    let text = |path| String::from_utf8_lossy(&std::fs::read(path).unwrap()).into_owned();
    Ended {
        status,
        said: text(&out) + &text(&err),
        seconds: seconds(usage.ru_utime) + seconds(usage.ru_stime),
        // `ru_maxrss` is in KiB on Linux and in bytes on other systems.
        peak: usage.ru_maxrss as u64 * if cfg!(target_os = "linux") { 1024 } else { 1 },
        hung,
    }
}

/// The status and the resources of a child, if it has ended. The standard library returns only the
/// status.
fn wait(child: u32) -> Option<(ExitStatus, libc::rusage)> {
    let mut status = 0;
    // SAFETY: all fields of a rusage are numbers, for which zero is a valid value.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: both pointers point to values that live until the call returns.
    let ended = unsafe { libc::wait4(child as i32, &mut status, libc::WNOHANG, &mut usage) };
    assert!(ended >= 0, "{}", std::io::Error::last_os_error());
    (ended > 0).then(|| (ExitStatus::from_raw(status), usage))
}
