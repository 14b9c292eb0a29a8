//! Process-wide settings that affect numerical results and memory.

use std::sync::OnceLock;

use squeeze_base::allocator;

use crate::symbols;

/// The settings that [`init`] could make.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Numerics {
    /// Whether fp32 on a GPU has its full precision. Otherwise convolutions may use TF32, with ten
    /// bits of mantissa.
    pub tf32_is_off: bool,
    /// Whether MKL's products do not depend on the number of threads. Few operations of libtorch
    /// use MKL.
    pub mkl_is_strict: bool,
}

impl Numerics {
    /// A sentence about the settings that could not be made; `None` if all were.
    #[must_use]
    pub fn note(self) -> Option<String> {
        let settings = [
            (self.tf32_is_off, "fp32 convolutions on a GPU may be TF32's"),
            (self.mkl_is_strict, "the last digits may depend on the number of threads"),
        ];
        let consequences: Vec<&str> =
            settings.iter().filter(|(reached, _)| !reached).map(|(_, consequence)| *consequence).collect();
        (!consequences.is_empty()).then(|| format!("this libtorch does not take all settings: {}", consequences.join("; ")))
    }
}

/// Makes the process-wide settings that the command line makes too:
///
/// - TF32 is off, as in PyTorch's default for matrices but not for convolutions.
/// - MKL's products are equal on any number of threads (`MKL_CBWR=AUTO,STRICT`).
/// - glibc reuses freed blocks of up to 1 GiB instead of returning each to the system, which saves
///   a tenth of a full-size forward.
///
/// Call it first in `main`: MKL takes the setting only before its first product.
/// `compress::run` and `pipeline::generate` call it too. Every later call does nothing and returns
/// the result of the first.
pub fn init() -> Numerics {
    static REACHED: OnceLock<Numerics> = OnceLock::new();
    *REACHED.get_or_init(|| {
        allocator::reuse_large_blocks();
        Numerics { tf32_is_off: symbols::set_tf32(false), mkl_is_strict: symbols::mkl_strict() }
    })
}

/// Allows TF32 for fp32 products and convolutions on a GPU, or forbids it again; false if this
/// libtorch does not take the setting. Only for measurements of what it would cost: [`init`]
/// forbids it.
#[doc(hidden)]
#[must_use]
pub fn allow_tf32(allowed: bool) -> bool {
    symbols::set_tf32(allowed)
}

#[cfg(test)]
mod tests {
    #[cfg(unix)]
    use std::ffi::c_void;

    #[cfg(unix)]
    use libloading::os::unix::{Library, Symbol};

    use super::*;

    #[test]
    #[cfg(unix)]
    fn the_settings_are_taken() {
        let reached = init();
        assert_eq!(reached, Numerics { tf32_is_off: true, mkl_is_strict: true });
        assert_eq!(reached.note(), None);
        assert!(Numerics { mkl_is_strict: false, ..reached }.note().unwrap().contains("number of threads"));
        // As libtorch itself sees it. The bench allows TF32 and forbids it again.
        assert!(allow_tf32(true) && allow_tf32(false));
        type Context = unsafe extern "C" fn() -> *mut c_void;
        type Get = unsafe extern "C" fn(*const c_void) -> bool;
        let process = Library::this();
        // SAFETY: as in `symbols::set_tf32`; the getter is a const member function without
        // arguments.
        let allowed = unsafe {
            let context: Symbol<Context> = process.get(b"_ZN2at13globalContextEv\0").unwrap();
            let get: Symbol<Get> = process.get(b"_ZNK2at7Context15allowTF32CuBLASEv\0").unwrap();
            get(context())
        };
        assert!(!allowed);
    }
}
