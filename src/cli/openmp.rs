//! Cores for libtorch's threads and ours.

/// Lets libtorch's threads wait for 5,000 turns of a loop before they sleep, not for the 300,000 that are GNU OpenMP's default, which keep
/// a core from the solver's own threads for milliseconds after each product. Compressing the bundled model takes 12 % less time so.
///
/// OpenMP reads this from the environment as it is loaded, before any code of ours: so the program starts once more in its own place, if
/// the environment says nothing of it.
#[cfg(target_os = "linux")]
pub fn wait_less() {
    use std::os::unix::process::CommandExt;

    const SPINS: &str = "GOMP_SPINCOUNT";
    if ["OMP_WAIT_POLICY", SPINS].iter().any(|name| std::env::var_os(name).is_some()) {
        return;
    }
    let mut arguments = std::env::args_os();
    let (Some(name), Ok(program)) = (arguments.next(), std::env::current_exe()) else { return };
    // Comes back only where it cannot be done; then the run is a little slower.
    let why = std::process::Command::new(program).arg0(name).args(arguments).env(SPINS, "5000").exec();
    tracing::debug!("could not start again with {SPINS} set: {why}");
}

/// Only GNU OpenMP waits so long.
#[cfg(not(target_os = "linux"))]
pub fn wait_less() {}
