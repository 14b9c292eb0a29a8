//! The results of commands on standard output.

use std::io::{self, Write};

use sdxl_squeeze::{Error, Result};

/// Writes a command's result to standard output. A reader that has gone away is no error.
pub(super) fn print(text: &str) -> Result<()> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(why) if why.kind() != io::ErrorKind::BrokenPipe => Err(Error::write("standard output".as_ref())(why)),
        _ => Ok(()),
    }
}

/// Writes a command's result to standard output as JSON.
pub(super) fn print_json(result: &impl serde::Serialize) -> Result<()> {
    let text = serde_json::to_string_pretty(result)
        .map_err(|why| Error::Failed(format!("the result cannot be written as JSON: {why}")))?;
    print(&format!("{text}\n"))
}
