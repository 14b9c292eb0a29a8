//! Writes the path of libtorch's folder into each target (rpath), like the build script of the
//! program.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    if let Some(lib) = std::env::var_os("DEP_TCH_LIBTORCH_LIB") {
        // Links are resolved, so that the binary does not need a link inside of the checkout.
        let lib = std::path::PathBuf::from(lib);
        let lib = lib.canonicalize().unwrap_or(lib);
        println!("cargo:rustc-link-arg=-Wl,-rpath,{}", lib.display());
    }
}
