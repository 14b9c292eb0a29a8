//! Inputs that are not regular files, have no end, or are far too large. The program refuses them
//! at once and names them.
#![cfg(unix)]

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use crate::squeeze::Squeeze;
use crate::support::{copy, emoji, repo};

/// Asserts that the command soon ends with exit code 2 and one short line.
#[track_caller]
fn refused_soon(command: &Squeeze, parts: &[&str]) {
    let ended = command.is_refused_within(Duration::from_secs(30), parts);
    let line = ended.error_line();
    assert!(line.len() < 1000, "{} bytes: {}…", line.len(), line.chars().take(200).collect::<String>());
}

/// `generate` with a picture that is thrown away.
fn draw(model: &Path) -> Squeeze {
    Squeeze::new("generate").model(model).with("-o", "/dev/null")
}

/// Paths that are not valid inputs: a device without end, a pipe without a writer, a folder, and a
/// file that is larger than any valid one.
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
    let (model, out, config) = (emoji(), folder.path().join("out"), "tutorial-s40-4bit-gs16");
    let compress = || Squeeze::new("compress").model(&model).out(&out);
    for path in impostors(folder.path()) {
        let refused = |command: Squeeze| refused_soon(&command, &[&path.display().to_string()]);
        refused(Squeeze::new("plan").arg(&path).model(&model));
        refused(compress().config_file(&path));
        for flag in ["--prompts", "--captions", "--samples"] {
            refused(compress().config(config).with(flag, &path));
        }
        let configs = repo(&format!("configs/{config}.yaml"));
        refused(Squeeze::new("compare").arg(configs).model(&model).out(&out).with("--judge", &path));
        refused(draw(&model).with("--prompt", "x").with("--unet", &path));
        refused(Squeeze::new("inspect").arg(&path));
        refused(Squeeze::new("verify").arg(&path));
        refused(Squeeze::new("export").arg(&path).with("--to", "coremltools").out(&out));
    }
    assert!(!out.exists());
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
        // The file is moved out of the model and back afterwards.
        let kept = folder.path().join("kept");
        std::fs::rename(&file, &kept).unwrap();
        for impostor in &impostors {
            std::os::unix::fs::symlink(impostor, &file).unwrap();
            let name = file.file_name().unwrap().to_str().unwrap();
            refused_soon(&draw(&model).with("--prompt", "x").with("--steps", "1"), &[name]);
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
    Squeeze::new("export").arg(emoji()).with("--to", "coreml").out(&package).succeeds();
    let verify = Squeeze::new("verify").arg(&package);
    let data = "Data/com.apple.CoreML";
    for file in ["Manifest.json".to_owned(), format!("{data}/model.mlmodel"), format!("{data}/weights/weight.bin")] {
        let file = package.join(file);
        // The file is moved out of the package, because a package must not contain other files.
        let kept = folder.path().join("kept");
        std::fs::rename(&file, &kept).unwrap();
        for impostor in &impostors {
            // A file of weights may have any size. The sparse file is refused because its first
            // byte is wrong.
            std::os::unix::fs::symlink(impostor, &file).unwrap();
            refused_soon(&verify, &[file.file_name().unwrap().to_str().unwrap()]);
            std::fs::remove_file(&file).unwrap();
        }
        std::fs::rename(&kept, &file).unwrap();
    }
    verify.succeeds();
}

#[test]
fn long_prompts_are_refused_by_name_wherever_they_are_written() {
    let folder = tempfile::tempdir().unwrap();
    let (model, here) = (emoji(), |name: &str| folder.path().join(name));
    let (out, file, listed) = (here("out"), here("prompts.txt"), here("listed.yaml"));
    std::fs::write(&file, format!("a cat\na dog\n{}\n", "x".repeat(10 << 20))).unwrap();
    let too_long = ["prompt 3 has 10,485,760 bytes; at most 64 KiB"];
    let compress = Squeeze::new("compress").config("tutorial-s40-4bit-gs16").model(&model).out(&out);
    refused_soon(&compress.clone().with("--prompts", &file), &too_long);
    let prompts = repo("calibration/emoji.txt");
    refused_soon(&compress.with("--prompts", prompts).with("--captions", &file), &too_long);
    let config = repo("configs/tutorial-s40-4bit-gs16.yaml");
    refused_soon(&Squeeze::new("compare").arg(config).model(&model).out(&out).with("--judge", &file), &too_long);
    let long = "é".repeat(50_000);
    std::fs::write(&listed, format!("calibration: {{prompts: [a cat, {long}]}}\nprune: {{}}\n")).unwrap();
    let plan = Squeeze::new("plan").arg(&listed).model(&model);
    refused_soon(&plan, &["listed.yaml:1:", "prompt 2 has 100,000 bytes; at most 64 KiB"]);
    refused_soon(&draw(&model).with("--prompt", &long), &["the prompt has 100,000 bytes"]);
    let negative = draw(&model).with("--prompt", "x").with("--negative-prompt", &long);
    refused_soon(&negative, &["the negative prompt has 100,000 bytes"]);
    // A long prompt below the limit is cut with a warning, which quotes only a part of the prompt.
    let said = draw(&model).with("--steps", "1").with("--prompt", &long[..60_000]).succeeds().stderr;
    assert!(said.contains("the prompt is cut to 77 tokens") && said.len() < 2000, "{} bytes", said.len());
    // Errors in other arguments do not quote long values in full either.
    for flag in ["--scheduler", "--device", "--dtype"] {
        refused_soon(&draw(&model).with("--prompt", "x").with(flag, &long), &["unknown"]);
    }
}

#[test]
fn thousands_of_patterns_are_soon_resolved_and_more_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (model, path) = (emoji(), folder.path().join("many.yaml"));
    let plan = Squeeze::new("plan").arg(&path).model(&model);
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
        let said = plan.ends_with(2).stderr;
        assert!(said.lines().count() <= 110 && said.contains("more mistakes"), "{} lines", said.lines().count());
        assert!(begin.elapsed() < Duration::from_secs(30), "{:?}", begin.elapsed());
        write(20_000, pattern);
        refused_soon(&plan, &["many.yaml:6:", "has 20000 patterns; at most 4096"]);
    }
}
