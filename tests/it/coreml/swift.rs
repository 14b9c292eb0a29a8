//! Pictures that the steps of Apple's Swift pipeline draw over the packages of `bundle`, compared
//! with those of `generate`.
//!
//! `tests/golden/check_swift.py` draws them in Python, where each package is evaluated without this
//! project's code.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::squeeze::Squeeze;
use crate::support::{copy, pixels, repo};

/// The settings of the pictures that are kept, and their files.
fn kept() -> Vec<(Value, PathBuf)> {
    let folder = repo("tests/golden/coreml/swift");
    let found: Value = serde_json::from_slice(&std::fs::read(folder.join("swift.json")).unwrap()).unwrap();
    let rows = found["pictures"].as_object().unwrap().values();
    rows.filter_map(|row| Some((row["settings"].clone(), folder.join(row["picture"].as_str()?)))).collect()
}

/// The signal-to-noise ratio of two pictures, in dB.
fn psnr(a: &Path, b: &Path) -> f64 {
    let [(a, size), (b, other)] = [pixels(a), pixels(b)];
    assert_eq!((size, a.len()), (other, b.len()));
    let squares: f64 = a.iter().zip(&b).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2)).sum();
    10.0 * (255.0_f64.powi(2) * a.len() as f64 / squares.max(1e-9)).log10()
}

/// `generate` with the settings of a picture; without those that Swift has and diffusers does not
/// have by default if it is not `as_swift`.
fn draw(settings: &Value, as_swift: bool, folder: &Path) -> PathBuf {
    let model = folder.join("model");
    std::fs::remove_dir_all(&model).ok();
    copy(&repo(settings["model"].as_str().unwrap()), &model);
    let path = model.join("scheduler/scheduler_config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    config.as_object_mut().unwrap().extend(settings["keys"].as_object().unwrap().clone());
    std::fs::write(&path, config.to_string()).unwrap();
    let (sampler, spacing) = match settings["scheduler"].as_str().unwrap() {
        "pndm" => ("plms", "leading"),
        _ => ("dpmpp-2m", "linspace"),
    };
    let out = folder.join("x.png");
    let mut run = Squeeze::new("generate").model(&model).with("--scheduler", sampler).with("--timestep-spacing", spacing);
    for (flag, key) in [("--prompt", "prompt"), ("--guidance", "guidance"), ("--steps", "steps"), ("--seed", "seed")] {
        let value = &settings[key];
        run = run.with(flag, value.as_str().map_or_else(|| value.to_string(), str::to_owned));
    }
    if as_swift {
        let sides = |key: &str| [settings[key].to_string(), settings[key].to_string()];
        run = run.with("--negative-prompt", settings["negative"].as_str().unwrap());
        run = run.arg("--original-size").args(sides("original_size")).arg("--target-size").args(sides("target_size"));
    }
    run.arg("--overwrite").with("-o", &out).succeeds();
    out
}

/// Row order, the encoded empty negative prompt, sizes of 1024, and predictions that are made
/// noise: an error in one of them changes the pictures by more.
#[test]
fn generate_draws_what_swifts_steps_draw() {
    let folder = tempfile::tempdir().unwrap();
    let kept = kept();
    assert!(kept.len() >= 3, "{}", kept.len());
    for (settings, picture) in kept {
        let made = draw(&settings, true, folder.path());
        let found = psnr(&made, &picture);
        assert!(found >= 50.0, "{}: {found} dB", picture.display());
    }
}

/// What diffusers gives the UNet by default is told apart.
#[test]
fn diffusers_defaults_draw_other_pictures_than_swift() {
    let folder = tempfile::tempdir().unwrap();
    let (settings, picture) = kept().into_iter().find(|(_, picture)| picture.ends_with("sizes-of-1024.png")).unwrap();
    let found = psnr(&draw(&settings, false, folder.path()), &picture);
    assert!(found < 40.0, "{found} dB");
}

#[test]
fn told_sizes_are_checked() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("x.png");
    let generate =
        |model: &str| Squeeze::new("generate").model(repo(model)).with("--prompt", "a").with("--steps", "2").with("-o", &out);
    let sized = |flag: &str, sides: [&str; 2]| generate("models/emoji-sdxl").arg(flag).args(sides);
    sized("--original-size", ["1024", "0"]).is_refused(&["a side of the original size", "between 1 and 65504"]);
    sized("--target-size", ["-1", "8"]).is_refused(&["a side of the target size"]);
    generate("tests/golden/refiner-like")
        .args(["--target-size", "8", "8"])
        .is_refused(&["an aesthetic score", "leave the target size out"]);
    assert!(!out.exists());
}
