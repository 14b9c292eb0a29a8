//! The libtorch that this process has loaded: its place and its version.

use std::path::{Path, PathBuf};

use squeeze_base::input::{self, Limit};

/// The release that the program is compiled for. Releases differ in their binary interfaces.
pub const RELEASE: &str = "2.11.0";

/// The libtorch of this process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Libtorch {
    /// The library file; `None` where the system does not tell it.
    pub library: Option<PathBuf>,
    /// Its version, such as `2.11.0+cu130`; `None` where no file beside it says so.
    pub version: Option<String>,
}

impl Libtorch {
    /// The libtorch that this process has loaded.
    #[must_use]
    pub fn loaded() -> Self {
        let library = library();
        let version = library.as_deref().and_then(version_of);
        Libtorch { library, version }
    }

    /// Whether its version is known and is that of another release.
    #[must_use]
    pub fn is_other_release(&self) -> bool {
        let release = |version: &String| version.split('+').next().is_some_and(|release| release == RELEASE);
        self.version.as_ref().is_some_and(|version| !release(version))
    }
}

/// The file that has libtorch's function `at::get_num_threads`.
#[cfg(unix)]
fn library() -> Option<PathBuf> {
    use std::ffi::{CStr, OsStr};
    use std::os::unix::ffi::OsStrExt;

    // SAFETY: the symbol is looked up by a constant name that ends with a zero, and never called.
    // `dladdr` writes to memory that lives until it returns; the name in it is the loader's, which
    // ends with a zero and stays as long as the library is loaded. libtorch is never unloaded.
    let path = unsafe {
        let symbol = libc::dlsym(libc::RTLD_DEFAULT, c"_ZN2at15get_num_threadsEv".as_ptr());
        let mut about = std::mem::zeroed::<libc::Dl_info>();
        if symbol.is_null() || libc::dladdr(symbol, &raw mut about) == 0 || about.dli_fname.is_null() {
            return None;
        }
        CStr::from_ptr(about.dli_fname)
    };
    let path = PathBuf::from(OsStr::from_bytes(path.to_bytes()));
    Some(path.canonicalize().unwrap_or(path))
}

#[cfg(not(unix))]
fn library() -> Option<PathBuf> {
    None
}

/// The version of the libtorch with the library `lib/…`: of a Python package as `version.py` says,
/// of a libtorch alone as `build-version` does.
fn version_of(library: &Path) -> Option<String> {
    let folder = library.parent()?.parent()?;
    let text = |name: &str| input::read_text(&folder.join(name), Limit::MANIFEST).ok();
    let of_python = text("version.py").and_then(|python| python_version(&python).map(str::to_owned));
    of_python.or_else(|| text("build-version").map(|text| text.trim().to_owned()))
}

/// The value of `__version__` in a Python file.
fn python_version(text: &str) -> Option<&str> {
    let value = text.lines().find_map(|line| line.strip_prefix("__version__ = "))?;
    Some(value.trim().trim_matches(['\'', '"']))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loaded_library_is_found_with_its_version() {
        let loaded = Libtorch::loaded();
        let library = loaded.library.clone().unwrap();
        assert!(library.is_file() && library.to_string_lossy().contains("torch"), "{loaded:?}");
        assert!(!loaded.is_other_release(), "{loaded:?}");
    }

    #[test]
    fn versions_and_releases() {
        let python = "from typing import Optional\n\n__all__ = ['__version__']\n__version__ = '2.10.1+cu130'\ndebug = False\n";
        assert_eq!(python_version(python), Some("2.10.1+cu130"));
        assert_eq!(python_version("__all__ = ['__version__']\n"), None);
        let of = |version: &str| Libtorch { library: None, version: Some(version.to_owned()) };
        assert!(of("2.10.1+cu130").is_other_release() && of("2.11.01").is_other_release());
        assert!(!of("2.11.0+cu130").is_other_release() && !of("2.11.0").is_other_release());
        assert!(!Libtorch { library: None, version: None }.is_other_release());
    }
}
