//! The program as it is installed: in a folder without a checkout of its repository.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use sdxl_squeeze::config::{RunConfig, read_prompts};
use sdxl_squeeze::shipped;
use serde_json::Value;

use crate::squeeze::Squeeze;
use crate::support::{container, copy, emoji, repo, tiny};

/// An empty folder, and the command `name` in it. Models are unpacked below the folder.
struct Elsewhere(tempfile::TempDir);

impl Elsewhere {
    fn new() -> Self {
        Elsewhere(tempfile::tempdir().unwrap())
    }

    fn at(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn run(&self, name: &str) -> Squeeze {
        let cache = self.at(".cache");
        Squeeze::new(name).folder(self.0.path()).env("SDXL_SQUEEZE_CACHE", cache.to_str().unwrap())
    }
}

/// The files with an extension in a folder of the repository: their paths in it, and contents.
fn files(folder: &str, extension: &str) -> BTreeMap<String, String> {
    let entries = std::fs::read_dir(repo(folder)).unwrap().map(|entry| entry.unwrap().path());
    let wanted = entries.filter(|path| path.extension().is_some_and(|is| is == extension));
    let named = |path: &Path| format!("{folder}/{}", path.file_name().unwrap().to_str().unwrap());
    wanted.map(|path| (named(&path), std::fs::read_to_string(&path).unwrap())).collect()
}

#[test]
fn every_config_and_every_prompt_of_the_repository_is_in_the_program() {
    let configs: BTreeMap<String, String> =
        shipped::configs().map(|config| (config.path.to_owned(), config.yaml.to_owned())).collect();
    let mut there = files("configs", "yaml");
    there.extend(files("configs/emoji", "yaml"));
    assert!(there.len() > 30 && configs == there);
    let prompts: BTreeMap<String, String> =
        shipped::prompts().map(|prompts| (prompts.path.to_owned(), prompts.text.to_owned())).collect();
    assert!(prompts.len() == 8 && prompts == files("calibration", "txt"));
}

#[test]
fn configs_are_listed_with_sizes_and_printed_as_they_are() {
    let elsewhere = Elsewhere::new();
    let rows: Vec<Value> = elsewhere.run("configs").arg("--json").succeeds().json();
    assert_eq!(rows.len(), shipped::configs().count());
    let row = |name: &str| rows.iter().find(|row| row["name"] == name).unwrap_or_else(|| panic!("no {name}"));
    let gib = |name: &str| row(name)["bytes"].as_f64().unwrap() / f64::from(1 << 30);
    let bits = |name: &str| row(name)["bits_per_weight"].as_f64().unwrap();
    // The sizes of the tutorial's table without the Core ML program.
    for (name, size) in [("dense-8bit", 2.393), ("dense-4bit-gs16", 1.201), ("tutorial-s50-4bit-gs16", 0.902)] {
        assert!((gib(name) - size).abs() < 0.0025, "{name}: {}", gib(name));
    }
    assert!((bits("squeeze-3bits") - 3.0).abs() < 1e-6 && (bits("tutorial-s50-4bit-gs16") - 3.0).abs() < 0.02);
    assert!(row("squeeze-text-vae")["bytes"].is_null());
    assert_eq!(row("emoji/kmeans-4bit")["summary"].as_str().unwrap().split(':').next(), Some("A baseline on the bundled model"));

    elsewhere.run("configs").succeeds().says(&["emoji/squeeze-as-s50", "4 bits a weight, one palette for each weight tensor."]);
    let shown = elsewhere.run("configs").args(["show", "emoji/kmeans-4bit"]).succeeds().stdout;
    assert_eq!(shown, std::fs::read_to_string(repo("configs/emoji/kmeans-4bit.yaml")).unwrap());
    elsewhere.run("configs").args(["show", "squeeze-4bits"]).is_refused(&["did you mean `squeeze-3bits`?"]);
}

/// The bytes are those of the same run in a checkout.
#[test]
fn a_run_by_name_needs_no_files() {
    let elsewhere = Elsewhere::new();
    // The result's folder has the name of the config, and the next command means the config still.
    let out = elsewhere.at("emoji/tutorial-s50-4bit-gs16");
    let few = ["--prompts", "emoji", "--calibration-nsamples", "2", "--steps", "2"];
    let name = "emoji/tutorial-s50-4bit-gs16";
    elsewhere.run("compress").with("--config", name).with("--out", name).args(few).arg("-v").succeeds();
    let model = RunConfig::read(&out.join("resolved.yaml")).unwrap().model.path.unwrap();
    assert!(model.starts_with(elsewhere.at(".cache")) && model.ends_with("emoji-sdxl"), "{}", model.display());
    let there = repo("configs/emoji/tutorial-s50-4bit-gs16.yaml");
    let twin = elsewhere.at("twin");
    Squeeze::new("compress").config_file(there).model(&model).out(&twin).args(few).succeeds();
    assert!(container(&out) == container(&twin));
    elsewhere.run("plan").arg(name).args(few).succeeds();
    // The bundled model has a name too, wherever a model is named.
    elsewhere.run("inspect").args(["emoji-sdxl", "--summary"]).succeeds().says(&["8,371,780 parameters"]);
    let draw = elsewhere.run("generate").model("models/emoji-sdxl").with("--prompt", "owl").with("--steps", "1");
    draw.with("-o", elsewhere.at("owl.png")).succeeds();
}

#[test]
fn names_that_are_wrong_lead_to_those_that_are_right() {
    let elsewhere = Elsewhere::new();
    let plan = |config: &str| elsewhere.run("plan").model(emoji()).arg(config);
    for (wrong, right) in [
        ("squeeze-s40-4bit-gs61", "`squeeze-s40-4bit-gs16`"),
        ("configs/squeeze-3bit.yaml", "`squeeze-3bits`"),
        ("kmeans-4bit", "`emoji/kmeans-4bit`"),
    ] {
        plan(wrong).is_refused(&["cannot read", wrong, "`sdxl-squeeze configs` lists them", "did you mean", right]);
    }
    plan("joint-s40-4bit-gs16").is_refused(&["tutorial-s40-4bit-gs16"]);
    let compress = elsewhere.run("compress").with("--config", "emoji/tutorial-s40-4bit-gs16").with("--out", "out");
    compress.with("--prompts", "emoji-varried").is_refused(&["emoji-varried", "did you mean `emoji-varied`?"]);
    // A file on the disk wins, under whatever name.
    std::fs::write(elsewhere.at("squeeze-3bits"), "palettise: {}\n").unwrap();
    plan("squeeze-3bits").is_refused(&["squeeze-3bits:1:1", "`palettize`"]);
    std::fs::write(elsewhere.at("judge"), "").unwrap();
    assert!(read_prompts(&elsewhere.at("judge")).unwrap_err().to_string().contains("no prompts"));
}

#[test]
fn a_run_needs_a_config_or_a_size() {
    let elsewhere = Elsewhere::new();
    let compress = |more: &[&str]| elsewhere.run("compress").model(tiny()).with("--out", "out").args(more);
    compress(&[]).is_refused(&["--size", "--config", "squeeze-s40-4bit-gs16, ", "emoji/kmeans-4bit"]);
    compress(&["--size", "1GB", "--target-bits", "3"]).is_refused(&["--size and --target-bits both set the size"]);
    compress(&["--size", "1"]).is_refused(&["--size 1 is too little", "take about"]);
    compress(&["--size", "500kB"]).is_refused(&["are too few: the smallest settings take", "beside the file's header"]);
    compress(&["--size", "much"]).is_refused(&["--size: `much` is not a size"]);
    compress(&["--size", "1GB", "--config", "squeeze-3bits"]).ends_with(2).says(&["cannot be used with"]);
    assert!(!elsewhere.at("out").exists());
}

#[test]
fn the_doctor_says_what_would_fail() {
    let elsewhere = Elsewhere::new();
    let doctor = || elsewhere.run("doctor");
    let checks: Vec<Value> = doctor().arg("--json").succeeds().json();
    let status = |checks: &[Value], name: &str| checks.iter().find(|check| check["check"] == name).unwrap()["status"].clone();
    for name in ["program", "libtorch", "disk", "model", "run"] {
        assert_eq!(status(&checks, name), "ok", "{name}");
    }
    assert!(checks.iter().all(|check| (check["status"] == "ok") == check.get("remedy").is_none()), "{checks:?}");

    let failed = doctor().args(["--model", "absent", "--json"]).ends_with(1);
    let checks: Vec<Value> = failed.json();
    assert_eq!(status(&checks, "model"), "fail");
    failed.says(&["a run would fail", "--model emoji-sdxl is the bundled model"]);
    let few = doctor().args(["--memory-budget", "1MiB"]).ends_with(1);
    few.says(&["ok    libtorch   2.11.0", "threads", "processor", "free in", "FAIL  run", "of memory are too little"]);
    let model = elsewhere.at("model");
    copy(&emoji(), &model);
    std::fs::remove_file(model.join("vae/diffusion_pytorch_model.safetensors")).unwrap();
    std::fs::remove_dir_all(model.join("tokenizer_2")).unwrap();
    let parts = doctor().model(&model).ends_with(1);
    parts.says(&["vae: no diffusion_pytorch_model.safetensors", "tokenizer_2", "fetch the model anew"]);
    std::fs::write(elsewhere.at("file"), b"").unwrap();
    let wrong = doctor().with("--out", "file/out").with("--config", "sqeeze-3bits").ends_with(1);
    wrong.says(&["FAIL  disk", "is no folder", "FAIL  config", "did you mean `squeeze-3bits`?"]);
}

#[test]
fn models_that_are_none_are_told_what_is_wanted() {
    let elsewhere = Elsewhere::new();
    let plan = |model: &Path| elsewhere.run("plan").arg("dense-4bit").model(model);
    plan("stabilityai/sdxl".as_ref()).is_refused(&["cannot read", "hf download stabilityai/sdxl --local-dir DIR"]);
    plan(&emoji().join("vae")).is_refused(&["is one part of the model", "name that folder"]);
    let calibrated = elsewhere.run("plan").arg("tutorial-s40-4bit-gs16").model(emoji().join("unet"));
    calibrated.is_refused(&["calibration needs the pipeline", "is one part of the model", "name that folder"]);
    let model = elsewhere.at("model");
    copy(&emoji(), &model);
    std::fs::remove_dir_all(model.join("scheduler")).unwrap();
    std::fs::remove_file(model.join("text_encoder/config.json")).unwrap();
    plan(&model).is_refused(&["scheduler/scheduler_config.json, text_encoder/config.json", "not whole"]);
}

/// The commands in the blocks `sh` of a page, each in one line without its comment.
fn commands(page: &str) -> Vec<String> {
    let text = std::fs::read_to_string(repo("docs").join(page)).unwrap().replace("\\\n", " ");
    let blocks = text.split("```sh\n").skip(1).map(|rest| rest.split("```").next().unwrap());
    let lines = blocks.flat_map(str::lines).map(|line| line.split(" #").next().unwrap().split(" > ").next().unwrap());
    lines.map(|line| line.trim().to_owned()).filter(|line| !line.is_empty()).collect()
}

/// With `--help` at its end a command is parsed and not run: an unknown flag before it is an error.
#[test]
fn the_commands_of_the_tutorial_have_flags_and_names_that_exist() {
    let all: Vec<String> = ["tutorial.md", "from-coremltools.md"].into_iter().flat_map(commands).collect();
    assert!(all.len() > 15, "{all:?}");
    let mut names = 0;
    for line in &all {
        // Texts in quotes have no flags.
        let words: Vec<&str> = line.split('"').step_by(2).flat_map(str::split_whitespace).collect();
        let [program, command, arguments @ ..] = &words[..] else { panic!("{line}") };
        assert_eq!(*program, "sdxl-squeeze", "{line}");
        // The text of a prompt was taken away.
        let arguments: Vec<&str> =
            arguments.iter().flat_map(|word| if *word == "--prompt" { vec![*word, "x"] } else { vec![*word] }).collect();
        Squeeze::new(command).args(&arguments).arg("--help").succeeds();
        let is_config = |word: &str| word.starts_with("emoji/") || word.starts_with("dense-") || word.starts_with("tutorial-s");
        for word in arguments.iter().filter(|word| is_config(word) && !word.ends_with(".png")) {
            assert!(shipped::config(word.as_ref()).is_some(), "{line}: no config {word}");
            names += 1;
        }
    }
    assert!(names > 8, "{names}");
}
