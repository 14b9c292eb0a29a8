//! The files that `compress` writes beside the container.

use std::io::{BufRead, BufReader};
use std::path::Path;

use sdxl_squeeze::config::RESOLVED_BY;
use sdxl_squeeze::{Error, Result};

/// The config as resolved, in the folder of the result.
pub(super) const RESOLVED: &str = "resolved.yaml";
/// The report, in the folder of the result.
pub(super) const REPORT: &str = "report.json";

/// Checks that config and report in `out` are those of an earlier run, which are replaced.
///
/// # Errors
/// [`Error::Argument`] if one of them was written by somebody else.
pub(super) fn check_own(out: &Path) -> Result<()> {
    let (resolved, report) = (out.join(RESOLVED), out.join(REPORT));
    let refused = |path: &Path| {
        let path = path.display();
        Err(Error::Argument(format!("{path} was not written by this program, which would replace it; name another --out")))
    };
    match resolved.is_file() {
        true if !is_resolved(&resolved) => refused(&resolved),
        // A run writes the config before the report.
        false if report.exists() => refused(&report),
        true | false => Ok(()),
    }
}

/// Whether the file begins as [`RunConfig::to_yaml`](sdxl_squeeze::config::RunConfig::to_yaml)
/// begins it.
fn is_resolved(path: &Path) -> bool {
    let mut line = String::new();
    let read = std::fs::File::open(path).and_then(|file| BufReader::new(file).read_line(&mut line));
    read.is_ok() && line.starts_with(RESOLVED_BY)
}
