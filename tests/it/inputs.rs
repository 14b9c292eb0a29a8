//! Inputs that are no files, have no end, or are far too large: refused at once, by name.
#![cfg(unix)]

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::support::{copy, emoji, ended_with, repo, squeeze, squeezing};

/// Must end with 2 and one line, soon.
fn refused_soon(args: &[&str], parts: &[&str]) {
    let mut child = squeezing(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let begin = Instant::now();
    while child.try_wait().unwrap().is_none() {
        if begin.elapsed() > Duration::from_secs(30) {
            child.kill().unwrap();
            panic!("{args:?} does not end");
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    let said = ended_with(2, &child.wait_with_output().unwrap());
    let errors: Vec<&str> = said.lines().filter(|line| line.contains("error")).collect();
    assert_eq!(errors.len(), 1, "{args:?}: {said}");
    parts.iter().for_each(|part| assert!(errors[0].contains(part), "no `{part}` in: {said}"));
    assert!(errors[0].len() < 1000, "{} bytes: {}…", errors[0].len(), errors[0].chars().take(200).collect::<String>());
}

/// A device without end, a pipe without a writer, a folder, and a file that is larger than any of
/// its kind.
fn impostors(folder: &Path) -> [PathBuf; 4] {
    let [pipe, below, large] = ["pipe", "below", "large"].map(|name| folder.join(name));
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    std::fs::create_dir(&below).unwrap();
    std::fs::File::create(&large).unwrap().set_len(1 << 40).unwrap();
    [PathBuf::from("/dev/zero"), pipe, below, large]
}

#[test]
fn what_is_no_regular_file_is_refused_wherever_one_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let (emoji, config) = (emoji(), repo("configs/tutorial-s40-4bit-gs16.yaml"));
    let (model, config, out) = (emoji.to_str().unwrap(), config.to_str().unwrap(), folder.path().join("out"));
    let out = out.to_str().unwrap();
    for path in impostors(folder.path()) {
        let path = path.to_str().unwrap();
        refused_soon(&["plan", path, "--model", model], &[path]);
        refused_soon(&["compress", "--config", path, "--model", model, "--out", out], &[path]);
        for flag in ["--prompts", "--captions", "--samples"] {
            refused_soon(&["compress", "--config", config, "--model", model, "--out", out, flag, path], &[path]);
        }
        refused_soon(&["compare", config, "--model", model, "--out", out, "--judge", path], &[path]);
        refused_soon(&["generate", "--model", model, "--prompt", "x", "-o", "/dev/null", "--unet", path], &[path]);
        refused_soon(&["inspect", path], &[path]);
        refused_soon(&["verify", path], &[path]);
        refused_soon(&["export", path, "--to", "coremltools", "--out", out], &[path]);
    }
    assert!(!Path::new(out).exists());
}

#[test]
fn every_small_file_of_a_model_is_bounded() {
    let folder = tempfile::tempdir().unwrap();
    let impostors = impostors(folder.path());
    let model = folder.path().join("model");
    copy(&repo("tests/golden/base-like"), &model);
    let shards = folder.path().join("shards");
    copy(&repo("tests/golden/v-prediction"), &shards);
    let index = std::fs::read_dir(shards.join("unet")).unwrap().map(|entry| entry.unwrap().path());
    let index = index.filter(|path| path.to_str().unwrap().ends_with("index.json")).last().unwrap();
    let files = [
        "model_index.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "text_encoder/config.json",
        "scheduler/scheduler_config.json",
        "tokenizer/vocab.json",
        "tokenizer/merges.txt",
        "tokenizer_2/tokenizer_config.json",
        "tokenizer_2/special_tokens_map.json",
    ];
    let files = files.map(|file| (model.clone(), model.join(file)));
    for (model, file) in files.into_iter().chain([(shards, index)]) {
        // Outside of the package, which holds nothing but its own files.
        let kept = folder.path().join("kept");
        std::fs::rename(&file, &kept).unwrap();
        for impostor in &impostors {
            std::os::unix::fs::symlink(impostor, &file).unwrap();
            let args = ["generate", "--model", model.to_str().unwrap(), "--prompt", "x", "--steps", "1", "-o", "/dev/null"];
            refused_soon(&args, &[file.file_name().unwrap().to_str().unwrap()]);
            std::fs::remove_file(&file).unwrap();
        }
        std::fs::rename(&kept, &file).unwrap();
    }
}

#[test]
fn every_file_of_a_package_is_bounded() {
    let folder = tempfile::tempdir().unwrap();
    let impostors = impostors(folder.path());
    let package = folder.path().join("x.mlpackage");
    ended_with(0, &squeeze(&["export", emoji().to_str().unwrap(), "--to", "coreml", "--out", package.to_str().unwrap()]));
    let data = "Data/com.apple.CoreML";
    for file in ["Manifest.json".to_owned(), format!("{data}/model.mlmodel"), format!("{data}/weights/weight.bin")] {
        let file = package.join(file);
        // Outside of the package, which holds nothing but its own files.
        let kept = folder.path().join("kept");
        std::fs::rename(&file, &kept).unwrap();
        for impostor in &impostors {
            // A file of weights may be of any size: this one is sparse, and wrong from its first
            // byte.
            std::os::unix::fs::symlink(impostor, &file).unwrap();
            refused_soon(&["verify", package.to_str().unwrap()], &[file.file_name().unwrap().to_str().unwrap()]);
            std::fs::remove_file(&file).unwrap();
        }
        std::fs::rename(&kept, &file).unwrap();
    }
    ended_with(0, &squeeze(&["verify", package.to_str().unwrap()]));
}

#[test]
fn long_prompts_are_refused_by_name_wherever_they_are_written() {
    let folder = tempfile::tempdir().unwrap();
    let emoji = emoji();
    let (model, here) = (emoji.to_str().unwrap(), |name: &str| folder.path().join(name).to_str().unwrap().to_owned());
    let config = repo("configs/tutorial-s40-4bit-gs16.yaml");
    let (config, out, file, listed) = (config.to_str().unwrap(), here("out"), here("prompts.txt"), here("listed.yaml"));
    std::fs::write(&file, format!("a cat\na dog\n{}\n", "x".repeat(10 << 20))).unwrap();
    let too_long = ["prompt 3 has 10,485,760 bytes; at most 64 KiB"];
    for flag in ["--prompts", "--captions"] {
        let prompts =
            if flag == "--captions" { repo("calibration/emoji.txt").to_str().unwrap().to_owned() } else { file.clone() };
        let args = ["compress", "--config", config, "--model", model, "--out", &out, "--prompts", &prompts, flag, &file];
        let args = if flag == "--prompts" { &args[..9] } else { &args };
        refused_soon(args, &too_long);
    }
    refused_soon(&["compare", config, "--model", model, "--out", &out, "--judge", &file], &too_long);
    let long = "é".repeat(50_000);
    std::fs::write(&listed, format!("calibration: {{prompts: [a cat, {long}]}}\nprune: {{}}\n")).unwrap();
    refused_soon(&["plan", &listed, "--model", model], &["listed.yaml:1:", "prompt 2 has 100,000 bytes; at most 64 KiB"]);
    let draw = ["generate", "--model", model, "-o", "/dev/null"];
    refused_soon(&[&draw[..], &["--prompt", &long]].concat(), &["the prompt has 100,000 bytes"]);
    refused_soon(
        &[&draw[..], &["--prompt", "x", "--negative-prompt", &long]].concat(),
        &["the negative prompt has 100,000 bytes"],
    );
    // What is allowed and does not fit is cut, and no more of it is quoted than says which it is.
    let said = ended_with(0, &squeeze(&[&draw[..], &["--steps", "1", "--prompt", &long[..60_000]]].concat()));
    assert!(said.contains("the prompt is cut to 77 tokens") && said.len() < 2000, "{} bytes", said.len());
    // Nor of other arguments.
    for args in [["--scheduler", &long], ["--device", &long], ["--dtype", &long]] {
        refused_soon(&[&draw[..], &["--prompt", "x"], &args].concat(), &["unknown"]);
    }
}

#[test]
fn thousands_of_patterns_are_soon_resolved_and_more_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (model, path) = (emoji(), folder.path().join("many.yaml"));
    let plan = ["plan", path.to_str().unwrap(), "--model", model.to_str().unwrap()];
    let write = |count: usize, pattern: &dyn Fn(usize) -> String| {
        let mut text =
            "solver: sequential\npalettize:\n  on_misfit: dense\n  global_config: {}\n  module_name_configs:\n".to_owned();
        (0..count).for_each(|number| writeln!(text, "    '{}': null", pattern(number)).unwrap());
        std::fs::write(&path, text).unwrap();
    };
    let patterns: [&dyn Fn(usize) -> String; 2] =
        [&|number| format!(r"down_blocks\.{number}\.conv"), &|number| format!(r"(up|down)_blocks\.\d+\..*{number}")];
    for pattern in patterns {
        write(4096, pattern);
        let begin = Instant::now();
        let output = squeeze(&plan);
        assert_eq!(output.status.code(), Some(2));
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(said.lines().count() <= 110 && said.contains("more mistakes"), "{} lines", said.lines().count());
        assert!(begin.elapsed() < Duration::from_secs(30), "{:?}", begin.elapsed());
        write(20_000, pattern);
        refused_soon(&plan, &["many.yaml:6:", "has 20000 patterns; at most 4096"]);
    }
}
