//! What libtorch's libraries read from the environment.

/// Starts the program once more in its own place where the environment does not say what these libraries read as they are loaded, before
/// any code of ours:
///
/// - `GOMP_SPINCOUNT`: GNU OpenMP's threads wait for 5,000 turns of a loop before they sleep, not for the 300,000 that are the default, which
///   keep a core from the solver's own threads for milliseconds after each product. Compressing the bundled model takes 12 % less time so.
/// - `MKL_CBWR`: the products that libtorch still gives to MKL, inside attention and convolutions, are the same on any number of threads. It
///   costs no time that could be measured. (Matrix products of our own are faer's.)
#[cfg(target_os = "linux")]
pub fn settle() {
    use std::os::unix::process::CommandExt;

    let unset = |names: &[&str]| names.iter().all(|name| std::env::var_os(name).is_none());
    let mut missing = Vec::new();
    if unset(&["OMP_WAIT_POLICY", "GOMP_SPINCOUNT"]) {
        missing.push(("GOMP_SPINCOUNT", "5000"));
    }
    if unset(&["MKL_CBWR"]) {
        missing.push(("MKL_CBWR", "AUTO,STRICT"));
    }
    if missing.is_empty() {
        return;
    }
    let mut arguments = std::env::args_os();
    let (Some(name), Ok(program)) = (arguments.next(), std::env::current_exe()) else { return };
    // Comes back only where it cannot be done; then the run is a little slower, and its last digits may depend on the number of threads.
    let why = std::process::Command::new(program).arg0(name).args(arguments).envs(missing).exec();
    tracing::warn!("could not start again with GOMP_SPINCOUNT and MKL_CBWR set: {why}");
}

/// Elsewhere libtorch has other libraries.
#[cfg(not(target_os = "linux"))]
pub fn settle() {}
