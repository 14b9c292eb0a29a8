//! Runs that are killed, and files with one bit changed.
//!
//! Two long tests are ignored by default and print a table: `killed_runs` and `flipped_bits`. The
//! variables `RELIABILITY_KILLS` (100), `RELIABILITY_FLIPS` (300) and `RELIABILITY_SEED` (1) change
//! their length and their random numbers. Every run of the tests tries a few kills and flips.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::support::{copy, ended_with, interrupted_among_the_layers, repo, squeeze, squeezing, tiny};

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap_or_else(|why| panic!("{name}={text}: {why}")))
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A command and its outputs.
struct Action {
    name: &'static str,
    args: Vec<String>,
    /// The flag with which a killed run continues, if there is one.
    resume: Option<&'static str>,
    /// The path that must not exist when the command begins, if there is one.
    new: Option<PathBuf>,
}

/// A folder with everything that the commands read and write.
struct Scene {
    root: tempfile::TempDir,
    container: PathBuf,
}

impl Scene {
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let made = root.path().join("made");
        ended_with(0, &squeeze(&args(&compress("tutorial-s50-4bit-gs16.yaml", &made))));
        let container = root.path().join("unet.squeezed.safetensors");
        std::fs::rename(made.join("unet.squeezed.safetensors"), &container).unwrap();
        std::fs::remove_dir_all(made).unwrap();
        Scene { root, container }
    }

    /// The folder to which the commands write.
    fn out(&self) -> PathBuf {
        self.root.path().join("out")
    }

    /// Empties the folder to which the commands write.
    fn clear(&self) {
        let _ = std::fs::remove_dir_all(self.out());
        std::fs::create_dir(self.out()).unwrap();
    }

    fn actions(&self) -> Vec<Action> {
        let out = self.out();
        let plain = |name, args: &[&str]| Action {
            name,
            args: args.iter().map(|arg| (*arg).to_owned()).collect(),
            resume: None,
            new: None,
        };
        let compressing = |name, config| Action { name, args: compress(config, &out), resume: Some("--resume"), new: None };
        let export = |name, format, file: &str| {
            let new = out.join(file);
            let mut args = vec!["export", text(&self.container), "--to", format, "--out", text(&new)];
            if format == "diffusers" {
                args.extend(["--model", text(tiny())]);
            }
            if format == "coremltools" {
                args.extend(["--small-weights", "move", "--overwrite"]);
            }
            Action { new: Some(new.clone()), ..plain(name, &args) }
        };
        let (picture, latents) = (out.join("x.png"), out.join("latents.safetensors"));
        let (judge, prompts) = (self.root.path().join("judge.txt"), repo("calibration/emoji.txt"));
        std::fs::write(&judge, "a picture of nothing at all\n").unwrap();
        let config = repo("configs/emoji/tutorial-s50-4bit-gs16.yaml");
        vec![
            compressing("compress, sequential", "tutorial-s50-4bit-gs16.yaml"),
            compressing("compress, joint", "squeeze-s50-4bit-gs16.yaml"),
            export("export --to coreml", "coreml", "x.mlpackage"),
            export("export --to diffusers", "diffusers", "diffusers"),
            export("export --to coremltools", "coremltools", "x.safetensors"),
            plain(
                "generate",
                &[
                    "generate",
                    "--model",
                    text(tiny()),
                    "--unet",
                    text(&self.container),
                    "--prompt",
                    "a cat",
                    "--steps",
                    "3",
                    "--overwrite",
                    "--latents-out",
                    text(&latents),
                    "-o",
                    text(&picture),
                ],
            ),
            plain(
                "compare",
                &[
                    "compare",
                    text(&config),
                    "--model",
                    text(tiny()),
                    "--prompts",
                    text(&prompts),
                    "--judge",
                    text(&judge),
                    "--steps",
                    "3",
                    "--calibration-nsamples",
                    "4",
                    "--held-out",
                    "3",
                    "--out",
                    text(&out.join("compared")),
                ],
            ),
        ]
    }
}

/// The arguments of a short compression of the tiny model.
fn compress(config: &str, out: &Path) -> Vec<String> {
    let (config, prompts) = (repo("configs/emoji").join(config), repo("calibration/emoji.txt"));
    let args = [
        "compress",
        "--config",
        text(&config),
        "--model",
        text(tiny()),
        "--out",
        text(out),
        "--prompts",
        text(&prompts),
        "--calibration-nsamples",
        "6",
        "--steps",
        "4",
    ];
    args.map(str::to_owned).into()
}

fn args(args: &[String]) -> Vec<&str> {
    args.iter().map(String::as_str).collect()
}

/// All files below a folder with their relative paths, and all empty folders.
fn tree(root: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    fn walk(root: &Path, folder: &Path, found: &mut BTreeMap<PathBuf, Vec<u8>>) {
        let mut empty = true;
        for entry in std::fs::read_dir(folder).unwrap() {
            empty = false;
            let path = entry.unwrap().path();
            if path.is_dir() {
                walk(root, &path, found);
            } else {
                found.insert(path.strip_prefix(root).unwrap().to_owned(), std::fs::read(&path).unwrap());
            }
        }
        if empty && folder != root {
            found.insert(folder.strip_prefix(root).unwrap().join(""), Vec::new());
        }
    }
    let mut found = BTreeMap::new();
    walk(root, root, &mut found);
    found
}

/// The files that an undisturbed run leaves. A file has its content here if two runs give it the
/// same content.
struct Expected {
    files: BTreeMap<PathBuf, Option<Vec<u8>>>,
    time: Duration,
}

impl Expected {
    fn of(scene: &Scene, action: &Action) -> Self {
        let once = || {
            scene.clear();
            ended_with(0, &squeeze(&args(&action.args)));
            tree(&scene.out())
        };
        let first = once();
        let begin = Instant::now();
        let second = once();
        let time = begin.elapsed();
        assert!(first.keys().eq(second.keys()), "{}: two runs leave different files", action.name);
        // Reports contain times, so they differ from run to run.
        let files = first.into_iter().map(|(path, content)| {
            let same = second[&path] == content;
            (path, same.then_some(content))
        });
        let files: BTreeMap<_, _> = files.collect();
        assert!(files.values().any(Option::is_some), "{}: nothing is the same twice", action.name);
        Expected { files, time }
    }

    /// Returns descriptions of files that are missing or have other bytes, and the names of files
    /// that should not exist.
    fn compare(&self, found: &BTreeMap<PathBuf, Vec<u8>>) -> (Vec<String>, Vec<String>) {
        let wrong = self.files.iter().filter_map(|(path, content)| match (content, found.get(path)) {
            (_, None) => Some(format!("{} is missing", path.display())),
            (Some(content), Some(found)) if found != content => Some(format!("{} has other bytes", path.display())),
            _ => None,
        });
        let left = found.keys().filter(|path| !self.files.contains_key(*path)).map(|path| path.display().to_string());
        (wrong.collect(), left.collect())
    }
}

/// The results of killing one command.
#[derive(Debug, Default, Clone)]
struct Kills {
    /// The number of kills of a running process.
    kills: usize,
    /// The number of processes that had ended before they were to be killed.
    too_late: usize,
    /// The number of rounds in which the next undisturbed run left the expected files and nothing
    /// else.
    same: usize,
    /// Descriptions of faults, one line each.
    faults: Vec<String>,
}

/// Kills commands `count` times in total, at random moments, and afterwards runs each command to
/// its end.
fn kill(scene: &Scene, actions: &[Action], count: usize, random: &mut ChaCha8Rng) -> Vec<(&'static str, Kills)> {
    let mut table: Vec<(&'static str, Kills)> = actions.iter().map(|action| (action.name, Kills::default())).collect();
    let expected: Vec<Expected> = actions.iter().map(|action| Expected::of(scene, action)).collect();
    let mut number = 0;
    while table.iter().map(|(_, kills)| kills.kills).sum::<usize>() < count && number < 4 * count {
        let at = number % actions.len();
        number += 1;
        let (action, expected, found) = (&actions[at], &expected[at], &mut table[at].1);
        scene.clear();
        // A run that can be resumed is killed once or twice.
        let times = if action.resume.is_some() { random.random_range(1..3) } else { 1 };
        for _ in 0..times {
            let mut child = start(action);
            std::thread::sleep(expected.time.mul_f64(random.random_range(0.02..1.1)));
            match child.try_wait().unwrap() {
                Some(_) => found.too_late += 1,
                None => {
                    child.kill().unwrap();
                    found.kills += 1;
                }
            }
            child.wait().unwrap();
        }
        // If the killed run completed a new folder, the command is not run again, because it would
        // refuse the existing folder.
        if !action.new.as_ref().is_some_and(|new| new.exists()) {
            let ended = squeeze(&args(&with_resume(action)));
            if !ended.status.success() {
                let said = String::from_utf8_lossy(&ended.stderr).into_owned();
                found.faults.push(format!("the next run ends with {}: {}", ended.status, said.trim()));
                continue;
            }
        }
        let (wrong, left) = expected.compare(&tree(&scene.out()));
        if wrong.is_empty() && left.is_empty() {
            found.same += 1;
        }
        found.faults.extend(wrong);
        found.faults.extend(left.into_iter().map(|path| format!("{path} is left")));
    }
    table
}

fn with_resume(action: &Action) -> Vec<String> {
    action.args.iter().cloned().chain(action.resume.map(str::to_owned)).collect()
}

fn start(action: &Action) -> Child {
    squeezing(&args(&with_resume(action))).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

/// Prints the table and fails if there was any fault.
fn judge_kills(table: &[(&'static str, Kills)]) {
    let mut lines = String::from(
        "| command | kills | ended before | rounds with the same bytes and nothing left | faults |\n|---|---|---|---|---|\n",
    );
    for (name, Kills { kills, too_late, same, faults }) in table {
        writeln!(lines, "| {name} | {kills} | {too_late} | {same} | {} |", faults.len()).unwrap();
    }
    println!("{lines}");
    let mut faults: BTreeMap<String, usize> = BTreeMap::new();
    for (name, kills) in table {
        for fault in &kills.faults {
            // Temporary names are random, so they are cut off before equal faults are counted.
            let fault = fault.split("partial-").next().unwrap_or(fault);
            *faults.entry(format!("{name}: {fault}")).or_default() += 1;
        }
    }
    assert!(faults.is_empty(), "{faults:#?}");
}

#[test]
#[ignore = "takes minutes: 100 kills"]
fn killed_runs() {
    let scene = Scene::new();
    let mut random = ChaCha8Rng::seed_from_u64(setting("RELIABILITY_SEED", 1));
    judge_kills(&kill(&scene, &scene.actions(), setting("RELIABILITY_KILLS", 100) as usize, &mut random));
}

#[test]
fn a_few_killed_runs() {
    let scene = Scene::new();
    let actions: Vec<_> =
        scene.actions().into_iter().filter(|action| ["generate", "compress, sequential"].contains(&action.name)).collect();
    judge_kills(&kill(&scene, &actions, 3, &mut ChaCha8Rng::seed_from_u64(2)));
}

/// The results of one command on files with a flipped bit.
#[derive(Debug, Default, Clone)]
struct Flips {
    flips: usize,
    /// The number of flips after which the command failed with a message.
    refused: usize,
    /// The number of flips after which the command gave the result of the undamaged file.
    same: usize,
    /// Descriptions of all other flips.
    missed: Vec<String>,
}

#[derive(Debug, Default)]
struct FlipTable(BTreeMap<&'static str, Flips>);

impl FlipTable {
    fn count(&mut self, command: &'static str, place: &str, result: &Outcome) {
        let flips = self.0.entry(command).or_default();
        flips.flips += 1;
        match result {
            Outcome::Refused => flips.refused += 1,
            Outcome::Same => flips.same += 1,
            Outcome::Missed(why) => flips.missed.push(format!("{place}: {why}")),
        }
    }

    /// Prints the table and fails if any flip was missed.
    fn judge(self) {
        let mut lines = String::from("| read by | flips | refused | the same result | missed |\n|---|---|---|---|---|\n");
        for (name, Flips { flips, refused, same, missed }) in &self.0 {
            writeln!(lines, "| {name} | {flips} | {refused} | {same} | {} |", missed.len()).unwrap();
        }
        println!("{lines}");
        let missed: Vec<String> =
            self.0.iter().flat_map(|(name, flips)| flips.missed.iter().map(move |missed| format!("{name}: {missed}"))).collect();
        assert!(missed.is_empty(), "{missed:#?}");
    }
}

enum Outcome {
    Refused,
    Same,
    Missed(String),
}

/// Flips a random bit of a file and returns a description of it.
fn flip(path: &Path, random: &mut ChaCha8Rng) -> String {
    let mut bytes = std::fs::read(path).unwrap();
    let (at, bit) = (random.random_range(0..bytes.len()), random.random_range(0..8));
    bytes[at] ^= 1 << bit;
    std::fs::write(path, &bytes).unwrap();
    format!("byte {at} of {}, bit {bit}, of {}", bytes.len(), path.file_name().unwrap().to_string_lossy())
}

/// Runs a command on a damaged file. It must fail with a message and leave no files.
fn must_refuse(scene: &Scene, command: &[&str]) -> Outcome {
    let ended = squeeze(command);
    let left = tree(&scene.out());
    match ended.status.code() {
        Some(1 | 2) if ended.stderr.is_empty() => Outcome::Missed("says nothing".into()),
        Some(1 | 2) if !left.is_empty() => Outcome::Missed(format!("leaves {:?}", left.keys().next())),
        Some(1 | 2) => Outcome::Refused,
        Some(0) => Outcome::Missed("accepted".into()),
        _ => Outcome::Missed(format!("ended with {}", ended.status)),
    }
}

/// Flips bits of a container, which every command that reads containers then reads.
fn flip_containers(scene: &Scene, count: usize, random: &mut ChaCha8Rng, table: &mut FlipTable) {
    let damaged = scene.root.path().join("damaged.safetensors");
    let (model, out) = (text(tiny()), scene.out());
    let [package, folder, dense, picture] = ["x.mlpackage", "diffusers", "x.safetensors", "x.png"].map(|name| out.join(name));
    let file = text(&damaged);
    let commands: [(&str, Vec<&str>); 6] = [
        ("container: verify", vec!["verify", file]),
        ("container: inspect", vec!["inspect", file]),
        ("container: export --to coreml", vec!["export", file, "--to", "coreml", "--out", text(&package)]),
        ("container: export --to diffusers", vec!["export", file, "--to", "diffusers", "--model", model, "--out", text(&folder)]),
        (
            "container: export --to coremltools",
            vec!["export", file, "--to", "coremltools", "--small-weights", "move", "--overwrite", "--out", text(&dense)],
        ),
        (
            "container: generate --unet",
            vec![
                "generate",
                "--model",
                model,
                "--unet",
                file,
                "--prompt",
                "a cat",
                "--steps",
                "1",
                "--overwrite",
                "-o",
                text(&picture),
            ],
        ),
    ];
    // The commands must accept the undamaged file. Otherwise their refusals would not show that
    // they find damage.
    std::fs::copy(&scene.container, &damaged).unwrap();
    for (_, command) in &commands {
        scene.clear();
        ended_with(0, &squeeze(command));
    }
    for _ in 0..count {
        std::fs::copy(&scene.container, &damaged).unwrap();
        let place = flip(&damaged, random);
        for (name, command) in &commands {
            scene.clear();
            table.count(name, &place, &must_refuse(scene, command));
        }
    }
}

/// Flips bits in the three files of a package in turn.
fn flip_packages(scene: &Scene, count: usize, random: &mut ChaCha8Rng, table: &mut FlipTable) {
    let (whole, damaged) = (scene.root.path().join("whole.mlpackage"), scene.root.path().join("damaged.mlpackage"));
    ended_with(0, &squeeze(&["export", text(&scene.container), "--to", "coreml", "--out", text(&whole)]));
    ended_with(0, &squeeze(&["verify", text(&whole)]));
    let files = ["Manifest.json", "Data/com.apple.CoreML/model.mlmodel", "Data/com.apple.CoreML/weights/weight.bin"];
    let names = ["package: verify (Manifest.json)", "package: verify (model.mlmodel)", "package: verify (weight.bin)"];
    for number in 0..count {
        let _ = std::fs::remove_dir_all(&damaged);
        copy(&whole, &damaged);
        scene.clear();
        let place = flip(&damaged.join(files[number % 3]), random);
        table.count(names[number % 3], &place, &must_refuse(scene, &["verify", text(&damaged)]));
    }
}

/// Flips bits in the files of an interrupted run's work folder, and then resumes the run.
#[cfg(unix)]
fn flip_work_folders(scene: &Scene, count: usize, random: &mut ChaCha8Rng, table: &mut FlipTable) {
    let action = Action {
        name: "compress",
        args: compress("squeeze-s50-4bit-gs16.yaml", &scene.out()),
        resume: Some("--resume"),
        new: None,
    };
    let mut expected = Expected::of(scene, &action);
    // The report lists damaged files, so its content may differ.
    let report = expected.files.keys().find(|path| path.ends_with("report.json")).cloned().unwrap();
    expected.files.insert(report, None);
    scene.clear();
    interrupted_among_the_layers(squeezing(&[&args(&action.args)[..], &["--progress", "json"]].concat()));
    let kept = scene.root.path().join("kept");
    copy(&scene.out(), &kept);
    // The lock file is empty and has no bits to flip.
    let files: Vec<_> = tree(&kept).into_iter().filter(|(_, content)| !content.is_empty()).map(|(path, _)| path).collect();
    assert!(files.iter().any(|path| text(path).contains("part-")), "{files:?}");
    for number in 0..count {
        scene.clear();
        copy(&kept, &scene.out());
        let path = &files[number % files.len()];
        let place = flip(&scene.out().join(path), random);
        let name = match text(path) {
            path if path.contains("part-") => "work folder: compress --resume (a part)",
            path if path.contains("sample") => "work folder: compress --resume (samples)",
            path if path.contains("run.json") => "work folder: compress --resume (run.json)",
            _ => "work folder: compress --resume (another file)",
        };
        let ended = squeeze(&args(&with_resume(&action)));
        let outcome = match ended.status.code() {
            Some(0) => {
                let (wrong, left) = expected.compare(&tree(&scene.out()));
                if wrong.is_empty() && left.is_empty() { Outcome::Same } else { Outcome::Missed(format!("{wrong:?} {left:?}")) }
            }
            Some(1 | 2) if !ended.stderr.is_empty() => Outcome::Refused,
            _ => Outcome::Missed(format!("ended with {}", ended.status)),
        };
        table.count(name, &place, &outcome);
    }
}

#[cfg(unix)]
#[test]
#[ignore = "takes minutes: 300 flips"]
fn flipped_bits() {
    let scene = Scene::new();
    let mut random = ChaCha8Rng::seed_from_u64(setting("RELIABILITY_SEED", 1));
    let count = setting("RELIABILITY_FLIPS", 300) as usize;
    let mut table = FlipTable::default();
    flip_packages(&scene, count.div_ceil(3), &mut random, &mut table);
    flip_work_folders(&scene, count.div_ceil(3), &mut random, &mut table);
    flip_containers(&scene, count / 3, &mut random, &mut table);
    table.judge();
}

#[test]
fn a_few_flipped_bits() {
    let scene = Scene::new();
    let mut table = FlipTable::default();
    flip_packages(&scene, 3, &mut ChaCha8Rng::seed_from_u64(3), &mut table);
    flip_containers(&scene, 1, &mut ChaCha8Rng::seed_from_u64(3), &mut table);
    table.judge();
}
