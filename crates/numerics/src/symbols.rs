//! Functions of libtorch and MKL that tch does not have, by their names in the loaded libraries.

use std::ffi::c_void;

use libloading::os::unix::{Library, Symbol};

/// `at::globalContext().setAllowTF32CuDNN(allowed)` and `.setAllowTF32CuBLAS(allowed)`: tch has no
/// function for them.
///
/// False if this libtorch has none.
pub(crate) fn set_tf32(allowed: bool) -> bool {
    tf32(&Library::this(), allowed).is_some()
}

fn tf32(process: &Library, allowed: bool) -> Option<()> {
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
pub(crate) fn mkl_strict() -> bool {
    const NOTHING: i32 = 1;
    const AUTO: i32 = 2;
    const STRICT: i32 = 0x1_0000;
    const ALL: i32 = -1;
    type Number = unsafe extern "C" fn(i32) -> i32;
    let process = Library::this();
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
