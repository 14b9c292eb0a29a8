//! Containers that commands read.

use std::path::Path;

use sdxl_squeeze::Result;
use sdxl_squeeze::checkpoint::SafetensorsFile;
use sdxl_squeeze::container::Container;

/// Opens a container. Its hashes are checked, which reads the whole file, unless `no_verify` is
/// set.
pub(super) fn open(path: &Path, no_verify: bool) -> Result<Container> {
    if no_verify { Container::open_unverified(path) } else { Container::open(path) }
}

/// Whether a file says that it is a container. A file that is none may be a single-file checkpoint.
pub(super) fn is_container(path: &Path) -> bool {
    let is_ours = |file: SafetensorsFile| file.metadata().get("format").is_some_and(|format| format == "sdxl-squeeze");
    SafetensorsFile::open(path).is_ok_and(is_ours)
}
