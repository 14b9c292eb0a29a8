//! Containers that commands read.

use std::path::Path;

use sdxl_squeeze::Result;
use sdxl_squeeze::container::Container;
pub(super) use sdxl_squeeze::container::is_container;

/// Opens a container. Its hashes are checked, which reads the whole file, unless `no_verify` is
/// set.
pub(super) fn open(path: &Path, no_verify: bool) -> Result<Container> {
    if no_verify { Container::open_unverified(path) } else { Container::open(path) }
}
