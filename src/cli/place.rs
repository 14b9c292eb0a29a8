//! The working directory, which may be gone.

use std::sync::atomic::{AtomicBool, Ordering};

use sdxl_squeeze::{Error, Result};

/// Whether there was no working directory when the program began.
static GONE: AtomicBool = AtomicBool::new(false);

/// Refuses to go on where there is no working directory: no path from there leads anywhere.
///
/// # Errors
/// [`Error::Argument`].
pub fn check() -> Result<()> {
    let gone = || Error::Argument("the working directory is not there any more; change to one that is".into());
    if GONE.load(Ordering::Relaxed) || std::env::current_dir().is_err() { Err(gone()) } else { Ok(()) }
}

/// Runs before the initializers of the libraries, of which libtorch's MKL ends the program with a message of its own, and no
/// other, where there is no working directory. It is given one, so that we can say what is wrong.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
extern "C" fn leave_what_is_gone() {
    let mut path = [0u8; libc::PATH_MAX as usize];
    // SAFETY: getcwd writes at most as many bytes as it is told, into memory that lives until it returns; chdir is given a
    // constant with a zero at its end. Both are system calls that need nothing of libc that is not set up when the loader comes
    // here, and at that time there is one thread.
    unsafe {
        if libc::getcwd(path.as_mut_ptr().cast(), path.len()).is_null() && *libc::__errno_location() == libc::ENOENT {
            GONE.store(true, Ordering::Relaxed);
            libc::chdir(c"/".as_ptr());
        }
    }
}

// SAFETY: the loader calls what this section of a program holds, as functions of C, once and before all initializers.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
#[used]
#[unsafe(link_section = ".preinit_array")]
static BEFORE_LIBRARIES: extern "C" fn() = leave_what_is_gone;
