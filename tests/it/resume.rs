//! Runs that are killed, interrupted, or resumed with another config.

use std::path::Path;
use std::time::{Duration, Instant};

use crate::squeeze::{Squeeze, same_on_all_threads};
use crate::support::{container, interrupted_among_the_layers, tiny};

/// Compresses the tiny model with few samples.
fn compress(out: &Path) -> Squeeze {
    Squeeze::new("compress").config("tutorial-s50-4bit-gs16").model(tiny()).out(out).samples(6, 4)
}

#[test]
fn killed_at_ten_moments_and_resumed_gives_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let whole = folder.path().join("whole");
    let begin = Instant::now();
    compress(&whole).succeeds();
    let time = begin.elapsed();
    let out = folder.path().join("killed");
    // The kills are spread over the time of a run, with a random offset each. Each run resumes the
    // one that was killed before.
    let resume = compress(&out).arg("--resume");
    let (mut kills, mut seed) = (0, 12345u32);
    for moment in 1..=10 {
        let mut child = resume.starts();
        seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let wait = time.mul_f64((f64::from(moment) + f64::from(seed >> 16) / 65536.0) / 16.0);
        std::thread::sleep(wait);
        if child.try_wait().unwrap().is_none() {
            child.kill().unwrap();
            kills += 1;
        }
        child.wait().unwrap();
        // A container that exists after a kill is complete.
        if out.join("unet.squeezed.safetensors").exists() {
            assert!(container(&out) == container(&whole), "killed at {wait:?}: another container");
            std::fs::remove_dir_all(&out).unwrap();
        }
    }
    resume.succeeds();
    assert!(container(&out) == container(&whole));
    assert!(!out.join("unet.squeezed.work").exists());
    assert!(kills >= 5, "only {kills} of ten runs were killed");
}

#[cfg(unix)]
#[test]
fn an_interrupt_ends_after_the_layer_at_hand_and_says_how_to_go_on() {
    let folder = tempfile::tempdir().unwrap();
    let (whole, out) = (folder.path().join("whole"), folder.path().join("stopped"));
    compress(&whole).succeeds();
    let interrupted = interrupted_among_the_layers(compress(&out).with("--progress", "json").command());
    let stdout = String::from_utf8_lossy(&interrupted.stdout);
    assert!(stdout.contains("with --resume continues the run"), "{stdout}");
    let parts = std::fs::read_dir(out.join("unet.squeezed.work")).unwrap().flatten();
    assert!(parts.filter(|entry| entry.file_name().to_string_lossy().starts_with("part-")).count() > 0);
    assert!(!out.join("unet.squeezed.safetensors").exists());

    // A run with another config is refused and does not change the work folder. A run with the same
    // config continues.
    let resume = compress(&out).arg("--resume");
    resume.clone().with("--target-sparsity", "0.3").ends_with(2).says(&["changed since it began: config"]);
    resume.succeeds();
    assert!(container(&out) == container(&whole));
}

/// Returns the container in `out` and removes the folder, so that the next run can write to it.
fn taken(out: &Path) -> Vec<u8> {
    let bytes = container(out);
    std::fs::remove_dir_all(out).unwrap();
    bytes
}

#[test]
fn the_same_bytes_on_any_number_of_threads() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    same_on_all_threads(&["1", "2", "3", "7"], &compress(&out), || taken(&out));
}

/// The joint solver has all refinements here that this project's own configs ask for.
#[test]
fn the_same_bytes_by_the_joint_solver_on_any_number_of_threads() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let joint = compress(&out).args(["--solver", "joint", "--sequencing", "sublayer", "--target", "dense"]);
    same_on_all_threads(&["1", "3", "7"], &joint, || taken(&out));
}

#[test]
fn the_same_picture_on_any_number_of_threads() {
    let folder = tempfile::tempdir().unwrap();
    let picture = folder.path().join("x.png");
    let draw = Squeeze::new("generate").model(tiny()).args(["--prompt", "a cat", "--steps", "3"]).with("-o", &picture);
    same_on_all_threads(&["1", "2", "3", "7"], &draw, || std::fs::read(&picture).unwrap());
}

#[test]
fn two_runs_do_not_share_a_folder() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let mut first = compress(&out).starts();
    let begin = Instant::now();
    while !out.join("unet.squeezed.work/run.json").exists() && begin.elapsed() < Duration::from_secs(60) {
        std::thread::sleep(Duration::from_millis(5));
    }
    compress(&out).ends_with(2).says(&["another run is at work"]);
    first.kill().unwrap();
    first.wait().unwrap();
}
