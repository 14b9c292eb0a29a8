//! The environment variables that libtorch's libraries read.

/// Replaces the process by a new one with these variables set, unless they are set already: the
/// libraries read them when they are loaded, before any code of this program runs.
///
/// - `GOMP_SPINCOUNT`: GNU OpenMP's threads spin 5,000 times before they sleep. The default of
///   300,000 keeps a core from the solver's own threads for milliseconds after each product. With
///   5,000, the bundled model is compressed in 12 % less time.
/// - `MKL_CBWR`: the products that libtorch gives to MKL, inside attention and convolutions, have
///   the same bits on any number of threads, at no measurable cost. (Other matrix products are
///   computed by faer.)
#[cfg(target_os = "linux")]
pub(super) fn settle() {
    use std::os::unix::process::CommandExt;

    let unset = |names: &[&str]| names.iter().all(|name| std::env::var_os(name).is_none());
    let mut missing = Vec::new();
    if unset(&["OMP_WAIT_POLICY", "GOMP_SPINCOUNT"]) {
        missing.push(("GOMP_SPINCOUNT", "5000"));
    }
    // libtorch for other processors has no MKL.
    if cfg!(target_arch = "x86_64") && unset(&["MKL_CBWR"]) {
        missing.push(("MKL_CBWR", "AUTO,STRICT"));
    }
    if missing.is_empty() {
        return;
    }
    let mut arguments = std::env::args_os();
    let (Some(name), Ok(program)) = (arguments.next(), std::env::current_exe()) else { return };
    // `exec` returns only on failure. The run is then a little slower, and its last digits may
    // depend on the number of threads.
    let why = std::process::Command::new(program).arg0(name).args(arguments).envs(missing).exec();
    tracing::warn!("could not start again with GOMP_SPINCOUNT and MKL_CBWR set: {why}");
}

/// On other systems libtorch has other libraries.
#[cfg(not(target_os = "linux"))]
pub(super) fn settle() {}
