//! The hostile files of `tests/attacks/`. The program refuses each of them with one line and exit
//! code 2, in little time and with little memory.
//!
//! `tests/attacks/README.md` lists the files, and this test reads the list.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use sdxl_squeeze::container::Container;
use sdxl_squeeze::pipeline::verify;

use crate::support::{copy, ended_with, repo, squeeze, squeezing, tiny};
use crate::watched::{Ended, run};

/// A time that no refusal needs, even if many tests share the processor.
const LIMIT: Duration = Duration::from_secs(120);

fn attacks() -> PathBuf {
    repo("tests/attacks")
}

/// The attacks that README.md lists: each file with words that its refusal contains.
fn listed() -> BTreeMap<String, String> {
    let text = std::fs::read_to_string(attacks().join("README.md")).unwrap();
    let rows = text.lines().filter_map(|line| {
        let cells: Vec<&str> = line.strip_prefix("| `")?.strip_suffix(" |")?.split(" | ").collect();
        let [name, _what, words] = cells[..] else { panic!("a row of another form: {line}") };
        Some((name.trim_end_matches('`').to_owned(), words.replace("\\|", "|")))
    });
    rows.collect()
}

/// The listed attacks of one kind.
fn of(kind: &str) -> Vec<(String, String)> {
    let rows: Vec<_> = listed().into_iter().filter(|(name, _)| name.starts_with(&format!("{kind}/"))).collect();
    assert!(rows.len() > 5, "the list of {kind} is lost");
    rows
}

/// Runs `command` for each attack of a kind, and reports all attacks that are not refused properly.
fn all_refused(kind: &str, command: impl Fn(&Path, &Path) -> Command) {
    let folder = tempfile::tempdir().unwrap();
    let mut faults = Vec::new();
    for (name, words) in of(kind) {
        let ended = run(command(&attacks().join(&name), folder.path()), LIMIT);
        faults.extend(fault(&ended, &words).map(|fault| format!("{name}: {fault}\n{}", ended.said)));
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

fn fault(ended: &Ended, words: &str) -> Option<String> {
    ended.fault().or_else(|| (!ended.said.contains(words)).then(|| format!("the words `{words}` are not said")))
}

/// Makes a pipeline whose UNet has `file` under `name`. All other files are links to a good
/// pipeline.
fn model_with(folder: &Path, name: &str, file: &Path) -> PathBuf {
    let (good, model) = (repo("tests/golden/base-like"), folder.join("model"));
    let _ = std::fs::remove_dir_all(&model);
    std::fs::create_dir_all(model.join("unet")).unwrap();
    for entry in std::fs::read_dir(&good).unwrap().map(Result::unwrap).filter(|entry| entry.file_name() != "unet") {
        std::os::unix::fs::symlink(entry.path(), model.join(entry.file_name())).unwrap();
    }
    for own in ["config.json", "diffusion_pytorch_model.safetensors"] {
        let target = if own == name { file.to_owned() } else { good.join("unet").join(own) };
        std::os::unix::fs::symlink(target, model.join("unet").join(own)).unwrap();
    }
    model
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A compression of the tiny model with a small config and one more flag.
fn compress(folder: &Path, flag: &str, file: &Path) -> Command {
    let (config, out) = (repo("configs/emoji/tutorial-s50-4bit-gs16.yaml"), folder.join("out"));
    let args = ["compress", "--config", text(&config), "--model", text(tiny()), "--out", text(&out), flag, text(file)];
    squeezing(&args)
}

#[test]
fn every_attack_is_listed_and_every_listed_attack_is_there() {
    let mut found = BTreeSet::new();
    for kind in std::fs::read_dir(attacks()).unwrap().map(|entry| entry.unwrap().path()).filter(|path| path.is_dir()) {
        for file in std::fs::read_dir(&kind).unwrap() {
            found.insert(text(file.unwrap().path().strip_prefix(attacks()).unwrap()).to_owned());
        }
    }
    found.retain(|name| !name.starts_with("good/"));
    assert_eq!(found, listed().into_keys().collect());
}

#[test]
fn what_the_attacks_were_made_from_is_good() {
    let good = attacks().join("good");
    ended_with(0, &squeeze(&["verify", text(&good.join("package.mlpackage"))]));
    // The container is undamaged, but its config is not that of a UNet.
    assert!(ended_with(2, &squeeze(&["verify", text(&good.join("container.safetensors"))])).contains("addition_embed_type"));
    Container::open(&good.join("container.safetensors")).unwrap().verify().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let mut run = compress(folder.path(), "--samples", &good.join("samples.safetensors"));
    ended_with(0, &run.output().unwrap());
}

#[test]
fn hostile_checkpoints_are_refused() {
    all_refused("safetensors", |file, folder| {
        let model = model_with(folder, "diffusion_pytorch_model.safetensors", file);
        squeezing(&["inspect", text(&model)])
    });
}

#[test]
fn hostile_model_configs_are_refused() {
    all_refused("unet_config", |file, folder| squeezing(&["inspect", text(&model_with(folder, "config.json", file))]));
}

#[test]
fn hostile_containers_are_refused() {
    // No attack has the tensors of a UNet, and `verify` may report that first. The content is
    // therefore checked through the library.
    for (name, words) in of("container") {
        let path = attacks().join(&name);
        let content = Container::open_unverified(&path).and_then(|container| container.verify());
        let why = content.and_then(|_| verify(&path)).expect_err(&name).to_string();
        assert!(why.contains(&words), "{name}: {why}");
    }
    let mut faults = Vec::new();
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("x.mlpackage");
    for (number, (name, _)) in of("container").iter().enumerate() {
        let file = attacks().join(name);
        // Starting a process takes longer than refusing a file, so each command gets only half of
        // the attacks.
        let command = match number % 2 {
            0 => squeezing(&["verify", text(&file)]),
            _ => squeezing(&["export", text(&file), "--to", "coreml", "--out", text(&out)]),
        };
        let ended = run(command, LIMIT);
        faults.extend(ended.fault().map(|fault| format!("{name}: {fault}\n{}", ended.said)));
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "an export left something");
}

#[test]
fn hostile_packages_are_refused() {
    all_refused("package", |overlay, folder| {
        let package = folder.join("x.mlpackage");
        let _ = std::fs::remove_dir_all(&package);
        copy(&attacks().join("good/package.mlpackage"), &package);
        copy(overlay, &package);
        squeezing(&["verify", text(&package)])
    });
}

#[test]
fn hostile_run_configs_are_refused() {
    let model = repo("tests/golden/base-like");
    all_refused("config", |file, _| squeezing(&["plan", text(file), "--model", text(&model)]));
}

#[test]
fn hostile_samples_are_refused() {
    all_refused("samples", |file, folder| compress(folder, "--samples", file));
}

#[test]
fn hostile_prompts_are_refused() {
    all_refused("prompts", |file, folder| compress(folder, "--prompts", file));
}
