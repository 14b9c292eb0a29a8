//! The end of a run that failed: messages on standard error and an exit code.
//!
//! A failure is one line. A bug, which is an [`Error::Internal`] or a panic, has its backtrace on
//! the lines after it.

use std::backtrace::Backtrace;
use std::error::Error as _;
use std::panic::{self, AssertUnwindSafe, PanicHookInfo};
use std::sync::{Mutex, PoisonError};

use sdxl_squeeze::Error;
use serde_json::json;

use super::progress::{VERSION, print_line};

/// Mistakes of a config that are shown.
const MISTAKES: usize = 100;

/// The message, place and backtrace of the last panic of any thread, for [`report_panic`].
static LAST_PANIC: Mutex<Option<(String, Backtrace)>> = Mutex::new(None);

/// Runs `command` and returns the program's exit code. Reports a failure on standard error,
/// `as_json` or in plain lines.
pub(super) fn exit_code(as_json: bool, command: impl FnOnce() -> Result<(), Error>) -> u8 {
    // Rust's own hook would print at once, in the midst of a progress bar.
    panic::set_hook(Box::new(keep));
    match panic::catch_unwind(AssertUnwindSafe(command)) {
        Ok(Ok(())) => 0,
        Ok(Err(error)) => {
            report(&error, as_json);
            if error.is_bad_input() { 2 } else { 1 }
        }
        Err(_) => {
            report_panic(as_json);
            1
        }
    }
}

/// Keeps a panic until [`report_panic`]. Called on the thread that panics, whose stack the
/// backtrace shows.
fn keep(panic: &PanicHookInfo<'_>) {
    let payload = panic.payload();
    let message = match (payload.downcast_ref::<String>(), payload.downcast_ref::<&str>()) {
        (Some(message), _) => message.as_str(),
        (None, Some(message)) => *message,
        (None, None) => "a panic without a message",
    };
    let text = match panic.location() {
        Some(place) => format!("{message} ({place})"),
        None => message.to_owned(),
    };
    *LAST_PANIC.lock().unwrap_or_else(PoisonError::into_inner) = Some((text, Backtrace::force_capture()));
}

/// Prints an error with its causes, as one line; every mistake of a config on a line of its own.
pub(super) fn report(error: &Error, as_json: bool) {
    match error {
        Error::Config { mistakes } => {
            mistakes.iter().take(MISTAKES).for_each(|mistake| complain(&mistake.to_string(), None, as_json));
            if mistakes.len() > MISTAKES {
                complain(&format!("and {} more mistakes", mistakes.len() - MISTAKES), None, as_json);
            }
        }
        error => complain(&chain(error), error.bug().map(|bug| &bug.backtrace), as_json),
    }
}

/// Prints the last panic of any thread.
fn report_panic(as_json: bool) {
    let panic = LAST_PANIC.lock().unwrap_or_else(PoisonError::into_inner).take();
    let (message, backtrace) = panic.expect("the hook has kept every panic since before the command began");
    complain(&format!("internal error, please report it: {message}"), Some(&backtrace), as_json);
}

fn complain(message: &str, backtrace: Option<&Backtrace>, as_json: bool) {
    let message = readable(message);
    let backtrace = backtrace.map(|backtrace| backtrace.to_string().trim_end().to_owned());
    if as_json {
        let mut line = json!({"version": VERSION, "event": "error", "text": message});
        if let Some(backtrace) = backtrace {
            line["backtrace"] = backtrace.into();
        }
        return print_line(&line.to_string());
    }
    print_line(&format!("sdxl-squeeze: error: {message}"));
    if let Some(backtrace) = backtrace {
        print_line(&backtrace);
    }
}

/// A message of readable length, whatever it quotes: names in damaged files may have megabytes.
fn readable(message: &str) -> String {
    const BEGIN: usize = 1500;
    const END: usize = 300;
    let characters = message.chars().count();
    if characters <= BEGIN + END {
        return message.to_owned();
    }
    let begin: String = message.chars().take(BEGIN).collect();
    let end: String = message.chars().skip(characters - END).collect();
    format!("{begin} … {end}")
}

/// An error and its causes in one line.
pub(super) fn chain(error: &Error) -> String {
    let mut line = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        line.push_str(": ");
        line.push_str(&error.to_string());
        cause = error.source();
    }
    line.replace('\n', " ")
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::process::Command;

    use super::*;

    #[test]
    fn messages_are_of_readable_length_and_keep_both_ends() {
        assert_eq!(readable("short"), "short");
        let long = readable(&format!("begin{}end", "é".repeat(10 << 20)));
        assert!(long.starts_with("begin") && long.ends_with("end") && long.chars().count() == 1803);
    }

    #[test]
    fn causes_stand_in_one_line() {
        let error = Error::layer("conv_in")(Error::write("a".as_ref())(io::Error::other("two\nlines")));
        assert_eq!(chain(&error), "`conv_in`: cannot write a: two lines");
    }

    /// A run that ends as `how`, in a process of its own: its exit code and standard error.
    fn run(how: &str) -> (Option<i32>, String) {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "cli::failure::tests::child", "--ignored", "--nocapture", "--test-threads=1"]);
        let output = command.env("FAILURE", how).env_remove("RUST_BACKTRACE").output().unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    }

    #[test]
    #[ignore = "runs only as a process of its own, which the tests below start"]
    #[expect(clippy::exit, reason = "this process is a command, whose exit code is tested")]
    fn child() {
        let as_json = std::env::var_os("FAILURE_AS_JSON").is_some();
        let code = exit_code(as_json, || match std::env::var("FAILURE").unwrap().as_str() {
            "bad input" => Err(Error::Argument("no such device".into())),
            "failure" => Err(Error::Failed("no memory".into())),
            "bug" => Err(Error::layer("conv_in")(Error::internal("no stage is loaded"))),
            "panic" => panic!("index out of range"),
            "panic of a thread" => {
                std::thread::spawn(|| panic!("deep down")).join().unwrap_or_else(|panic| panic::resume_unwind(panic))
            }
            _ => Ok(()),
        });
        std::process::exit(code.into());
    }

    #[test]
    fn failures_are_one_line() {
        assert_eq!(run("not at all"), (Some(0), String::new()));
        assert_eq!(run("bad input"), (Some(2), "sdxl-squeeze: error: no such device\n".into()));
        assert_eq!(run("failure"), (Some(1), "sdxl-squeeze: error: no memory\n".into()));
    }

    #[test]
    fn bugs_are_one_line_that_asks_for_a_report_and_a_backtrace() {
        let (code, text) = run("bug");
        assert_eq!(code, Some(1));
        let (line, backtrace) = text.split_once('\n').unwrap();
        assert_eq!(line, "sdxl-squeeze: error: `conv_in`: internal error, please report it: no stage is loaded");
        assert!(backtrace.contains("failure::tests::child"), "{backtrace}");
    }

    #[test]
    fn panics_are_one_line_that_asks_for_a_report_and_a_backtrace() {
        for (how, message) in [("panic", "index out of range"), ("panic of a thread", "deep down")] {
            let (code, text) = run(how);
            assert_eq!(code, Some(1));
            let (line, backtrace) = text.split_once('\n').unwrap();
            assert!(line.starts_with("sdxl-squeeze: error: internal error, please report it: "), "{line}");
            assert!(line.contains(message) && line.contains("failure.rs:"), "{line}");
            assert!(backtrace.contains("panic_with_hook"), "{backtrace}");
        }
    }
}
