//! Broken promises of this library.

use std::backtrace::Backtrace;

/// A bug in this library: the invariant that did not hold, and the place in the code.
///
/// The backtrace is captured whether or not `RUST_BACKTRACE` is set: a bug may take hours to show
/// itself again, and its report is of little use without one.
#[derive(Debug)]
pub struct Bug {
    /// The broken invariant, in one line.
    pub problem: String,
    /// The calls that led to the discovery.
    pub backtrace: Backtrace,
}
