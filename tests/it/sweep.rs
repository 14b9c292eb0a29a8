//! `compare --sweep`: the curve of error against size.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::squeeze::Squeeze;
use crate::support::{container, repo, report, tiny};

/// A folder with a base whose budget the sweep replaces, and prompts to judge on.
struct Scene(tempfile::TempDir);

impl Scene {
    fn new() -> Self {
        let scene = Scene(tempfile::tempdir().unwrap());
        // Few layers take part, so that the error curves take seconds.
        let yaml = "
solver: joint
palettize:
  global_config: {n_bits: 4, granularity: per_grouped_channel, group_size: 16}
  module_name_configs: {'(down|up)_blocks\\..*': null}
  on_misfit: dense
budget: {target_size: 1 MiB, probes: 2}
";
        std::fs::write(scene.at("base.yaml"), yaml).unwrap();
        std::fs::write(scene.at("scalar.yaml"), yaml.replace("probes: 2", "probes: 2, no_vectors: true")).unwrap();
        std::fs::write(scene.at("judge.txt"), "an owl\na rocket\n").unwrap();
        scene
    }

    fn at(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn sweep(&self, range: &str, out: &str) -> Squeeze {
        Squeeze::new("compare")
            .with("--sweep", range)
            .arg(repo("configs/dense-4bit.yaml"))
            .config_file(self.at("base.yaml"))
            .model(tiny())
            .with("--judge", self.at("judge.txt"))
            .args(["--held-out", "4", "--no-noise-floor", "--progress=json"])
            .samples(6, 3)
            .out(self.at(out))
    }
}

/// How often a run with progress in JSON measured error curves.
fn measured(stderr: &str) -> usize {
    let begins = |line: &&str| line.contains("\"begin\"") && line.contains("\"error curves\"");
    stderr.lines().filter(begins).count()
}

fn rows(out: &Path) -> Vec<Value> {
    report(out)["rows"].as_array().unwrap().clone()
}

#[test]
fn a_curve_has_the_sizes_asked_for_and_each_is_what_a_run_alone_gives() {
    let scene = Scene::new();
    let ended = scene.sweep("3..6:1.5", "out").succeeds();
    assert_eq!(measured(&ended.stderr), 1, "{ended}");
    let rows = rows(&scene.at("out"));
    let names: Vec<&str> = rows.iter().map(|row| row["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["base-3.0-bits", "base-4.5-bits", "base-6.0-bits", "dense-4bit"]);
    assert_eq!(rows.iter().filter(|row| row["curve"] == "base").count(), 3);
    let number = |row: usize, key: &str| rows[row][key].as_f64().unwrap();
    for (row, asked) in [3.0, 4.5, 6.0].into_iter().enumerate() {
        let bits = number(row, "bits_per_weight");
        assert!(bits <= asked && bits > asked - 0.1, "{bits} for {asked}");
    }
    for row in 0..2 {
        assert!(number(row, "bytes") < number(row + 1, "bytes"));
        assert!(number(row, "unet_error") > number(row + 1, "unet_error"));
    }
    // Plot and table have them all.
    let drawing = std::fs::read_to_string(scene.at("out/curve.svg")).unwrap();
    let document = roxmltree::Document::parse(&drawing).unwrap();
    assert_eq!(document.descendants().filter(|node| node.has_tag_name("circle")).count(), 4);
    let read = |name: &str| std::fs::read_to_string(scene.at("out").join(name)).unwrap();
    assert!(read("report.html").contains("Error against size") && read("report.html").contains("base there"));
    assert!(read("table.md").contains("| config | bytes | bits/weight | PSNR | UNet error, % | base there, % |"));

    let alone = scene.at("alone");
    Squeeze::new("compress")
        .config_file(scene.at("base.yaml"))
        .model(tiny())
        .samples(6, 3)
        .with("--target-bits", "4.5")
        .out(&alone)
        .succeeds();
    let of_curve = std::fs::read(scene.at("out/base-4.5-bits.squeezed.safetensors")).unwrap();
    assert!(of_curve == container(&alone), "the size of the curve and the run alone differ");
}

#[test]
fn what_was_measured_is_taken_again_and_what_is_damaged_is_said() {
    let scene = Scene::new();
    let prices = scene.at("out/base.prices.json");
    let only = |range: &str| scene.sweep(range, "out").arg("--containers-only").succeeds();
    let written = |name: &str| std::fs::metadata(scene.at(name)).unwrap().modified().unwrap();
    assert_eq!(measured(&only("4..4").stderr), 1);
    let first = written("out/base-4.0-bits.squeezed.safetensors");
    // A further size needs no measurement, and the one that is there stays.
    assert_eq!(measured(&only("4..5:1").stderr), 0);
    assert_eq!(written("out/base-4.0-bits.squeezed.safetensors"), first);
    let whole = std::fs::read(scene.at("out/base-5.0-bits.squeezed.safetensors")).unwrap();

    for damage in ["bytes", "another model's samples"] {
        std::fs::remove_file(scene.at("out/base-5.0-bits.row.json")).unwrap();
        let content = std::fs::read(&prices).unwrap();
        let run = if damage == "bytes" {
            std::fs::write(&prices, &content[1..]).unwrap();
            scene.sweep("5..5", "out").arg("--containers-only")
        } else {
            scene.sweep("5..5", "out").args(["--containers-only", "--seed", "9"])
        };
        let ended = run.succeeds();
        assert_eq!(measured(&ended.stderr), 1, "{damage}: {ended}");
        let row: Value = serde_json::from_str(&std::fs::read_to_string(scene.at("out/base-5.0-bits.row.json")).unwrap()).unwrap();
        let said = row["row"]["warnings"].as_array().unwrap().iter().any(|warning| {
            warning.as_str().unwrap().contains("base.prices.json is damaged or of another run: error curves are measured again")
        });
        assert!(said, "{damage}: {row}");
        if damage == "bytes" {
            assert!(std::fs::read(scene.at("out/base-5.0-bits.squeezed.safetensors")).unwrap() == whole);
        }
    }
}

#[test]
fn two_bases_are_two_curves_and_parts_make_the_report_of_one_piece() {
    let scene = Scene::new();
    let sweep = || scene.sweep("4..5:1", "out").config_file(scene.at("scalar.yaml"));
    let ended = sweep().succeeds();
    assert_eq!(measured(&ended.stderr), 2, "{ended}");
    let curves: Vec<Value> = rows(&scene.at("out")).iter().map(|row| row["curve"].clone()).collect();
    assert_eq!(curves, ["base".into(), "base".into(), "scalar".into(), "scalar".into(), Value::Null]);
    let files = |out: &str| {
        ["report.html", "report.json", "table.md", "curve.svg"].map(|name| std::fs::read(scene.at(out).join(name)).unwrap())
    };
    for part in ["1/2", "2/2"] {
        sweep().with("--part", part).succeeds();
    }
    Squeeze::new("compare").with("--merge", scene.at("out")).out(scene.at("merged")).succeeds();
    assert!(files("merged") == files("out"));
}

#[test]
fn sweeps_that_cannot_be_are_refused() {
    let scene = Scene::new();
    scene.sweep("4..2", "no").is_refused(&["--sweep 4..2", "LOW <= HIGH"]);
    scene.sweep("2..3", "no").with("--target-bits", "3").is_refused(&["--sweep and --target-bits both set sizes"]);
    // A base that a budget cannot be for is refused with its name.
    let sequential = repo("configs/tutorial-s40-4bit-gs16.yaml");
    scene.sweep("2..3", "no").config_file(sequential).is_refused(&["a budget needs `solver: joint`"]);
    scene.sweep("2..3", "no").config_file(scene.at("base.yaml")).is_refused(&["name different places"]);
    assert!(!scene.at("no").exists());
    // A size that the settings do not reach is named, with how many bytes would do.
    let small = scene.sweep("0.5..1", "small").arg("--containers-only");
    small.ends_with(2).says(&["base-0.5-bits: ", "are too few: the smallest settings take"]);
    // The shipped base and the tutorial's recipes need no files of configs.
    let shipped = Squeeze::new("compare").with("--sweep", "5..5").model(tiny()).with("--judge", scene.at("judge.txt"));
    let ended = shipped.args(["--held-out", "2", "--no-noise-floor"]).samples(6, 3).out(scene.at("shipped")).succeeds();
    ended.says(&["squeeze-5.0-bits", "tutorial-s40-4bit-gs16", "tutorial-2of4-4bit-gs16"]);
}
