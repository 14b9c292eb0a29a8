//! Writes libtorch's folder into test programs (rpath), so that nobody has to set `LD_LIBRARY_PATH`.
//!
//! `squeeze-base` learns the folder from `torch-sys`, if its feature `torch` is on, and hands it to
//! the crates above. Crates without libtorch of their own need it too: cargo turns the feature on
//! for all members of the workspace at once.
#![allow(clippy::print_stdout, reason = "cargo reads a build script's output")]

fn main() {
    println!("cargo:rerun-if-changed=../../build/rpath.rs");
    let folder = ["DEP_TCH_LIBTORCH_LIB", "DEP_SQUEEZE_BASE_LIBTORCH"].into_iter().find_map(std::env::var_os);
    if let Some(lib) = folder {
        // The folder itself, not a link to it: the program then also works away from the checkout.
        let lib = std::path::PathBuf::from(lib);
        let lib = lib.canonicalize().unwrap_or(lib);
        println!("cargo:rustc-link-arg=-Wl,-rpath,{}", lib.display());
        println!("cargo:libtorch={}", lib.display());
    }
}
