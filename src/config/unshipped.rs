//! The error about a file that is neither on the disk nor shipped with the program.

use std::io::ErrorKind;
use std::path::Path;

use squeeze_base::error::Error;

/// `error`; if it says that the file at `path` does not exist, and the path may be a name that was
/// mistyped, an error that names what was probably meant.
///
/// `place` is the folder of the shipped files, which ends with a slash, and their extension;
/// `meant` finds the nearest of their names, and `absent` says that none of them is asked for.
pub(super) fn unshipped(
    path: &Path,
    error: Error,
    (folder, extension): (&str, &str),
    meant: impl FnOnce(&str) -> Option<&'static str>,
    absent: &str,
) -> Error {
    let is_missing = matches!(&error, Error::Read { source, .. } if source.kind() == ErrorKind::NotFound);
    let Some(text) = path.to_str().filter(|_| is_missing && path.is_relative()) else { return error };
    let name = text.strip_prefix(folder).unwrap_or(text);
    let hint =
        meant(name.strip_suffix(extension).unwrap_or(name)).map_or(String::new(), |name| format!("; did you mean `{name}`?"));
    Error::Argument(format!("cannot read {text}: there is no such file, and {absent}{hint}"))
}
