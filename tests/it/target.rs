//! `compress --target-error` and `--target-psnr`: the smallest file that reaches a closeness.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::squeeze::{Ended, Squeeze};
use crate::support::{container, report, tiny};

/// A folder with a config whose budget has no target yet, and prompts to judge on.
struct Scene(tempfile::TempDir);

/// What results are judged on, as flags of `compare`.
const JUDGED: [&str; 3] = ["--held-out", "4", "--no-noise-floor"];

impl Scene {
    fn new() -> Self {
        let scene = Scene(tempfile::tempdir().unwrap());
        // Few layers take part, so that a solve takes a second.
        let yaml = "
solver: joint
palettize:
  global_config: {n_bits: 4, granularity: per_grouped_channel, group_size: 16}
  module_name_configs: {'(down|up)_blocks\\..*': null}
  on_misfit: dense
budget: {probes: 2, target_calls: 4}
";
        std::fs::write(scene.at("search.yaml"), yaml).unwrap();
        std::fs::write(scene.at("size.yaml"), yaml.replace("target_calls: 4", "target_bits: 4")).unwrap();
        std::fs::write(scene.at("judge.txt"), "an owl\na rocket\n").unwrap();
        scene
    }

    fn at(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// The run that searches for a closeness, into the folder `out`.
    fn search(&self, flag: &str, target: &str, out: &str) -> Squeeze {
        self.search_of(tiny(), flag, target, out)
    }

    /// The same on another model.
    fn search_of(&self, model: &Path, flag: &str, target: &str, out: &str) -> Squeeze {
        let run = Squeeze::new("compress").config_file(self.at("search.yaml")).model(model).samples(6, 3).out(self.at(out));
        run.with("--target-prompts", self.at("judge.txt")).with(flag, target).arg("--progress=json")
    }

    /// The only row of a comparison, into the folder `out`.
    fn compared(&self, config: &Path, out: &str) -> Value {
        let run = Squeeze::new("compare").arg(config).model(tiny()).with("--judge", self.at("judge.txt"));
        run.args(JUDGED).samples(6, 3).out(self.at(out)).succeeds();
        report(&self.at(out))["rows"][0].clone()
    }
}

/// How often a run with progress in JSON began a task.
fn begun(run: &Ended, task: &str) -> usize {
    run.stderr.lines().filter(|line| line.contains("\"begin\"") && line.contains(&format!("\"{task}\""))).count()
}

fn number(value: &Value, key: &str) -> f64 {
    value[key].as_f64().unwrap_or_else(|| panic!("no number `{key}` in {value}"))
}

/// Checks that the search into `out` found the smallest size of `measure`, whose closeness at 4
/// bits is that of the row `usual`, and that a comparison measures the same of it.
fn check_found(scene: &Scene, out: &str, measure: &str, usual: &Value, is_close: &dyn Fn(&Value) -> bool) {
    let found = report(&scene.at(out));
    let search = &found["search"];
    assert_eq!(search["goal"]["measure"], measure);
    let sizes = search["sizes"].as_array().unwrap();
    assert!((2..=6).contains(&sizes.len()), "{search}");
    for size in sizes {
        assert_eq!(size["is_reached"].as_bool().unwrap(), is_close(size), "{size}");
    }
    let best = sizes.iter().filter(|size| is_close(size)).min_by_key(|size| size["bytes"].as_u64()).unwrap();
    // The result is the smallest that reached it, 4 bits do too, and what is smaller does not.
    assert_eq!(found["bytes"], best["bytes"]);
    assert_eq!(container(&scene.at(out)).len() as u64, best["bytes"].as_u64().unwrap());
    assert!(number(best, "bytes") <= 1.01 * number(usual, "bytes"), "{search} {}", usual["bytes"]);
    let ended = search["ended"].as_str().unwrap();
    assert!(["within_one_percent", "nothing_between"].contains(&ended), "{search}");
    let below = sizes.iter().filter(|size| !is_close(size)).map(|size| number(size, "bytes")).fold(0.0, f64::max);
    assert!(below > 0.0 && below < number(best, "bytes"), "{search}");
    assert!(ended != "within_one_percent" || number(best, "bytes") <= 1.01 * below, "{search}");
    let mut files: Vec<String> =
        std::fs::read_dir(scene.at(out)).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    files.sort();
    assert_eq!(files, ["report.json", "resolved.yaml", "unet.squeezed.safetensors"]);

    // The recipe that was found is a plain config, of which a comparison shows the same.
    let row = scene.compared(&scene.at(out).join("resolved.yaml"), &format!("{out}-compared"));
    assert_eq!((&row["bytes"], &row["unet_error"]), (&best["bytes"], &best["unet_error"]));
    if measure == "psnr" {
        assert_eq!(row["psnr"]["mean"], best["psnr"]);
    }
    let compared = std::fs::read(scene.at(&format!("{out}-compared/resolved.squeezed.safetensors"))).unwrap();
    assert!(compared == container(&scene.at(out)));
}

#[test]
fn the_smallest_file_of_an_error_and_of_a_psnr_is_found() {
    let scene = Scene::new();
    let usual = scene.compared(&scene.at("size.yaml"), "usual");
    let error = number(&usual, "unet_error") * 1.001;
    let ended = scene.search("--target-error", &format!("{}%", 100.0 * error), "error").succeeds();
    check_found(&scene, "error", "unet_error", &usual, &|size| number(size, "unet_error") <= error);
    let solves = report(&scene.at("error"))["search"]["sizes"].as_array().unwrap().len();
    assert_eq!((begun(&ended, "error curves"), begun(&ended, "compressing")), (1, solves), "{ended}");
    assert_eq!((begun(&ended, "dense pictures"), begun(&ended, "pictures")), (1, 0), "{ended}");
    ended.says(&["bits a weight, ", "which reaches the target", "which does not reach the target", "solved sizes: "]);
    ended.says(&["UNet error  PSNR, dB   target", "reached", "missed"]);

    let psnr = number(&usual["psnr"], "mean") - 0.01;
    scene.search("--target-psnr", &psnr.to_string(), "psnr").succeeds();
    check_found(&scene, "psnr", "psnr", &usual, &|size| number(size, "psnr") >= psnr);
}

#[test]
fn a_target_that_no_size_reaches_is_an_error_with_the_best() {
    let scene = Scene::new();
    // Weights in fp32 are rounded to fp16 at any size.
    let model = scene.at("fp32");
    Squeeze::new("synth").args(["--preset", "tiny", "--dtype", "f32"]).out(&model).succeeds();
    let ended = scene.search_of(&model, "--target-error", "0.00000000001%", "out").ends_with(2);
    ended.says(&[
        "a UNet error of at most 0.00000000001 % is not reached: the closest of",
        "the settings of least error",
        "ask for less",
    ]);
    assert!(!scene.at("out/unet.squeezed.safetensors").exists());
}

#[test]
fn killed_and_resumed_solves_no_size_twice_and_gives_the_same_bytes() {
    let scene = Scene::new();
    let usual = scene.compared(&scene.at("size.yaml"), "usual");
    let target = format!("{}%", 100.0 * number(&usual, "unet_error"));
    scene.search("--target-error", &target, "whole").succeeds();
    let whole = report(&scene.at("whole"));
    let sizes = whole["search"]["sizes"].as_array().unwrap();

    let resumed = scene.search("--target-error", &target, "killed").arg("--resume");
    let mut kills = 0;
    for _ in 0..4 {
        let mut child = resumed.starts();
        let judged = || {
            let work = std::fs::read_dir(scene.at("killed/unet.squeezed.work")).into_iter().flatten().flatten();
            work.filter(|entry| entry.file_name().to_string_lossy().ends_with(".judged.json")).count()
        };
        let before = judged();
        // Each run is killed soon after it has judged a further size.
        while child.try_wait().unwrap().is_none() && judged() == before {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        std::thread::sleep(std::time::Duration::from_millis(150));
        if child.try_wait().unwrap().is_none() {
            child.kill().unwrap();
            kills += 1;
        }
        child.wait().unwrap();
        if kills == 2 {
            break;
        }
    }
    assert_eq!(kills, 2);
    let ended = resumed.succeeds();
    assert!(container(&scene.at("killed")) == container(&scene.at("whole")), "killed and resumed, other bytes");
    assert_eq!(report(&scene.at("killed"))["search"], whole["search"]);
    assert_eq!(begun(&ended, "error curves"), 0, "{ended}");
    // Two sizes were judged before.
    assert!(begun(&ended, "compressing") <= sizes.len() - 2, "{ended}");
}

#[test]
fn the_same_file_on_any_number_of_threads() {
    let scene = Scene::new();
    let on = |threads: &str| {
        let run = scene.search("--target-psnr", "24", threads);
        run.env("OMP_NUM_THREADS", threads).env("RAYON_NUM_THREADS", threads).succeeds();
        (container(&scene.at(threads)), report(&scene.at(threads))["search"]["sizes"].clone())
    };
    let one = on("1");
    assert!(on("3") == one, "other bytes, or other sizes on the way");
}

#[test]
fn targets_that_cannot_be_are_refused_and_plans_say_how_many_solves() {
    let scene = Scene::new();
    std::fs::write(scene.at("calibrated.txt"), "european castle\n").unwrap();
    let run = Squeeze::new("compress").config_file(scene.at("search.yaml")).model(tiny()).samples(6, 3).out(scene.at("no"));
    let run = run.with("--target-error", "1%").arg("--progress=json");
    let among = run.clone().with("--target-prompts", scene.at("calibrated.txt"));
    among.is_refused(&["`european castle` is judged on, so it cannot be calibrated on"]);
    assert!(!scene.at("no/unet.squeezed.work").exists());
    run.clone().with("--target-prompts", scene.at("absent.txt")).is_refused(&["cannot read", "absent.txt"]);
    run.clone().with("--target-bits", "3").ends_with(2).says(&["--target-bits and --target-error exclude each other"]);
    run.with("--target-prompts", scene.at("no/resolved.yaml")).is_refused(&["would write", "the prompts of the target reads"]);
    // A comparison has sizes; it does not search for them.
    let compare = Squeeze::new("compare").arg(scene.at("search.yaml")).model(tiny()).with("--judge", scene.at("judge.txt"));
    let compare = compare.with("--target-error", "1%").samples(6, 3).out(scene.at("compared"));
    compare.is_refused(&["search: `target_error` and `target_psnr` are reached by a search over several sizes"]);

    let plan = Squeeze::new("plan").arg(scene.at("search.yaml")).model(tiny()).samples(6, 3).with("--target-psnr", "30");
    plan.clone().succeeds().says(&["compresses to up to 6 sizes and draws the prompts that each is judged on"]);
    let rows: Value = plan.with("--target-solves", "3").arg("--json").succeeds().json();
    assert_eq!(rows[0]["most_solves"], 3);
}
