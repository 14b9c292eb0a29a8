//! Process-wide settings that affect numerical results and memory.

use std::ffi::c_void;
use std::sync::OnceLock;

use libloading::os::unix::{Library, Symbol};
use squeeze_base::allocator;

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
        let process = Library::this();
        Numerics { tf32_is_off: set_tf32(&process, false).is_some(), mkl_is_strict: mkl_strict(&process) }
    })
}

/// Allows TF32 for fp32 products and convolutions on a GPU, or forbids it again; false if this
/// libtorch does not take the setting. Only for measurements of what it would cost: [`init`]
/// forbids it.
#[doc(hidden)]
#[must_use]
pub fn allow_tf32(allowed: bool) -> bool {
    set_tf32(&Library::this(), allowed).is_some()
}

/// `at::globalContext().setAllowTF32CuDNN(allowed)` and `.setAllowTF32CuBLAS(allowed)`: tch has no
/// function for them.
fn set_tf32(process: &Library, allowed: bool) -> Option<()> {
    type Context = unsafe extern "C" fn() -> *mut c_void;
    type Set = unsafe extern "C" fn(*mut c_void, bool);
    // SAFETY: the names are those of C++ functions under the Itanium ABI that libtorch is built
    // with on this platform. A name spells out its argument types, so another signature has another
    // name. `globalContext` returns a reference to an object that lives as long as the process, and
    // member functions take it as their first argument.
    unsafe {
        let context: Symbol<Context> = process.get(b"_ZN2at13globalContextEv\0").ok()?;
        let convolutions: Symbol<Set> = process.get(b"_ZN2at7Context17setAllowTF32CuDNNEb\0").ok()?;
        let products: Symbol<Set> = process.get(b"_ZN2at7Context18setAllowTF32CuBLASEb\0").ok()?;
        let context = context();
        convolutions(context, allowed);
        products(context, allowed);
    }
    Some(())
}

/// `mkl_cbwr_set(MKL_CBWR_AUTO | MKL_CBWR_STRICT)`, by the name that the function has inside
/// libtorch. True also where there is no MKL.
fn mkl_strict(process: &Library) -> bool {
    const NOTHING: i32 = 1;
    const AUTO: i32 = 2;
    const STRICT: i32 = 0x1_0000;
    const ALL: i32 = -1;
    type Number = unsafe extern "C" fn(i32) -> i32;
    // SAFETY: MKL's C functions `mkl_cbwr_set` and `mkl_cbwr_get` take and return an int. The names
    // inside the library belong to these functions: a test reads the setting back.
    unsafe {
        let (Ok(set), Ok(get)) = (process.get::<Number>(b"mkl_serv_cbwr_set\0"), process.get::<Number>(b"mkl_serv_cbwr_get\0"))
        else {
            return !cfg!(target_arch = "x86_64");
        };
        // A branch that the user has chosen in the environment stays.
        let chosen = get(ALL);
        if chosen & STRICT == 0 {
            set(if chosen == NOTHING { AUTO } else { chosen } | STRICT);
        }
        get(ALL) & STRICT != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
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
        // SAFETY: as in `set_tf32`; the getter is a const member function without arguments.
        let allowed = unsafe {
            let context: Symbol<Context> = process.get(b"_ZN2at13globalContextEv\0").unwrap();
            let get: Symbol<Get> = process.get(b"_ZNK2at7Context15allowTF32CuBLASEv\0").unwrap();
            get(context())
        };
        assert!(!allowed);
    }
}
