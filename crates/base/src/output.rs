//! Writes files so that a reader sees the old content or the new, never half of either, and removes
//! the leftovers of killed runs.

mod destination;
mod file;
mod folder;
mod leftovers;
mod parent;
mod persist;

pub use destination::{is_standard_output, would_replace};
pub use file::{check_file, write_file};
pub use folder::{NewFolder, check_folder};
pub use parent::parent;
