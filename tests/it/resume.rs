//! Runs that are killed, interrupted, or changed under way.

use std::path::Path;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use crate::support::{ended_with, interrupted_among_the_layers, repo, same_on_all_threads, squeeze, squeezing, tiny};

fn args(out: &Path, more: &[&str]) -> Vec<String> {
    let config = repo("configs/tutorial-s50-4bit-gs16.yaml");
    let (model, prompts) = (tiny(), repo("calibration/emoji.txt"));
    let mut args = vec!["compress", "--config", config.to_str().unwrap(), "--model", model.to_str().unwrap()];
    args.extend(["--out", out.to_str().unwrap(), "--prompts", prompts.to_str().unwrap()]);
    args.extend(["--calibration-nsamples", "6", "--steps", "4"]);
    args.extend(more);
    args.into_iter().map(str::to_owned).collect()
}

fn run(out: &Path, more: &[&str], code: i32) -> String {
    ended_with(code, &squeeze(&args(out, more).iter().map(String::as_str).collect::<Vec<_>>()))
}

fn start(out: &Path, more: &[&str]) -> Child {
    let args = args(out, more);
    squeezing(&args.iter().map(String::as_str).collect::<Vec<_>>()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

fn container(out: &Path) -> Vec<u8> {
    std::fs::read(out.join("unet.squeezed.safetensors")).unwrap()
}

#[test]
fn killed_at_ten_moments_and_resumed_gives_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let whole = folder.path().join("whole");
    let begin = Instant::now();
    run(&whole, &[], 0);
    let time = begin.elapsed();
    let out = folder.path().join("killed");
    // Moments spread over a run, each a little off the even ones; each run goes on where the last
    // was killed.
    let (mut kills, mut seed) = (0, 12345u32);
    for moment in 1..=10 {
        let mut child = start(&out, &["--resume"]);
        seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let wait = time.mul_f64((f64::from(moment) + f64::from(seed >> 16) / 65536.0) / 16.0);
        std::thread::sleep(wait);
        if child.try_wait().unwrap().is_none() {
            child.kill().unwrap();
            kills += 1;
        }
        child.wait().unwrap();
        // Whatever is there is whole.
        if out.join("unet.squeezed.safetensors").exists() {
            assert!(container(&out) == container(&whole), "killed at {wait:?}: another container");
            std::fs::remove_dir_all(&out).unwrap();
        }
    }
    run(&out, &["--resume"], 0);
    assert!(container(&out) == container(&whole));
    assert!(!out.join("unet.squeezed.work").exists());
    assert!(kills >= 5, "only {kills} of ten runs were killed");
}

#[cfg(unix)]
#[test]
fn an_interrupt_ends_after_the_layer_at_hand_and_says_how_to_go_on() {
    let folder = tempfile::tempdir().unwrap();
    let (whole, out) = (folder.path().join("whole"), folder.path().join("stopped"));
    run(&whole, &[], 0);
    let run_of = args(&out, &[]);
    let ended = interrupted_among_the_layers(&run_of.iter().map(String::as_str).collect::<Vec<_>>());
    let said = String::from_utf8_lossy(&ended.stdout).into_owned();
    assert!(said.contains("with --resume continues the run"), "{said}");
    let parts = std::fs::read_dir(out.join("unet.squeezed.work")).unwrap().flatten();
    assert!(parts.filter(|entry| entry.file_name().to_string_lossy().starts_with("part-")).count() > 0);
    assert!(!out.join("unet.squeezed.safetensors").exists());

    // A run of something else is refused and leaves it alone; the same goes on.
    let refused = run(&out, &["--resume", "--target-sparsity", "0.3"], 2);
    assert!(refused.contains("changed since it began: config"), "{refused}");
    run(&out, &["--resume"], 0);
    assert!(container(&out) == container(&whole));
}

#[test]
fn the_same_bytes_on_any_number_of_threads() {
    let folder = tempfile::tempdir().unwrap();
    same_on_all_threads(&["1", "2", "3", "7"], |command| {
        let out = folder.path().join("out");
        ended_with(0, &command(&args(&out, &[])).output().unwrap());
        let bytes = container(&out);
        std::fs::remove_dir_all(&out).unwrap();
        bytes
    });
}

/// The joint solver with every refinement, as our own configs ask for.
#[test]
fn the_same_bytes_by_the_joint_solver_on_any_number_of_threads() {
    let folder = tempfile::tempdir().unwrap();
    same_on_all_threads(&["1", "3", "7"], |command| {
        let out = folder.path().join("out");
        let more = ["--solver", "joint", "--sequencing", "sublayer", "--target", "dense"];
        ended_with(0, &command(&args(&out, &more)).output().unwrap());
        let bytes = container(&out);
        std::fs::remove_dir_all(&out).unwrap();
        bytes
    });
}

#[test]
fn the_same_picture_on_any_number_of_threads() {
    let folder = tempfile::tempdir().unwrap();
    same_on_all_threads(&["1", "2", "3", "7"], |command| {
        let picture = folder.path().join("x.png");
        let args = [
            "generate",
            "--prompt",
            "a cat",
            "--steps",
            "3",
            "--model",
            tiny().to_str().unwrap(),
            "-o",
            picture.to_str().unwrap(),
        ];
        ended_with(0, &command(&args.map(str::to_owned)).output().unwrap());
        std::fs::read(&picture).unwrap()
    });
}

#[test]
fn two_runs_do_not_share_a_folder() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let mut first = start(&out, &[]);
    let begin = Instant::now();
    while !out.join("unet.squeezed.work/run.json").exists() && begin.elapsed() < Duration::from_secs(60) {
        std::thread::sleep(Duration::from_millis(5));
    }
    let refused = run(&out, &[], 2);
    assert!(refused.contains("another run is at work"), "{refused}");
    first.kill().unwrap();
    first.wait().unwrap();
}
