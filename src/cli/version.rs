//! The version of the program.

/// The version, and the build: a run goes on only with the build that began it.
pub(super) const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), " (build ", env!("SDXL_SQUEEZE_BUILD"), ")");
