//! The working directory, which may be gone.

use std::sync::atomic::{AtomicBool, Ordering};

use sdxl_squeeze::{Error, Result};

/// Whether there was no working directory when the program began.
static GONE: AtomicBool = AtomicBool::new(false);

/// Refuses to run without a working directory: no relative path leads anywhere.
///
/// # Errors
/// [`Error::Argument`].
pub(super) fn check() -> Result<()> {
    let gone = || Error::Argument("the working directory is not there any more; change to one that is".into());
    if GONE.load(Ordering::Relaxed) || std::env::current_dir().is_err() { Err(gone()) } else { Ok(()) }
}

/// Gives a process without a working directory one, before the initializers of the libraries run:
/// that of libtorch's MKL would end the process with a message of its own, before [`check`] can
/// report the cause.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
extern "C" fn leave_what_is_gone() {
    let mut path = [0u8; libc::PATH_MAX as usize];
    // SAFETY: getcwd writes at most the given number of bytes, into memory that lives until it
    // returns; chdir is given a constant that ends with a zero. Both are system calls that need
    // nothing of libc that is not set up when the loader calls this function, and at that time
    // there is one thread.
    unsafe {
        if libc::getcwd(path.as_mut_ptr().cast(), path.len()).is_null() && *libc::__errno_location() == libc::ENOENT {
            GONE.store(true, Ordering::Relaxed);
            libc::chdir(c"/".as_ptr());
        }
    }
}

// SAFETY: the loader calls the pointers in this section as functions of C, once and before all
// initializers.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
#[used]
#[unsafe(link_section = ".preinit_array")]
static BEFORE_LIBRARIES: extern "C" fn() = leave_what_is_gone;
