//! The commands of the program, as users run them.

use std::process::Command;

use serde_json::Value;
use tch::Kind;

use crate::squeeze::Squeeze;
use crate::support::{emoji, ended_with, pixels, relative_error, tensors};

/// `generate` with the bundled model.
fn generate(prompt: &str) -> Squeeze {
    Squeeze::new("generate").model(emoji()).with("--prompt", prompt)
}

#[test]
fn generate_draws_the_reference_picture_and_says_how() {
    let out = tempfile::tempdir().unwrap();
    let (picture, latents) = (out.path().join("cat.png"), out.path().join("cat.safetensors"));
    let run = generate("a picture of a cat face!").args(["--seed", "231", "--guidance", "4"]);
    let ended = run.with("--latents-out", &latents).with("-o", &picture).succeeds();
    ended.says(&["64x64, 30 steps of EulerDiscreteScheduler, seed 231"]);
    let reference = tensors(&emoji().join("reference.safetensors"));
    assert!(relative_error(&tensors(&latents)["latents"], &reference["final_latents"]) < 1e-4);

    let (drawn, size) = pixels(&picture);
    assert_eq!((size, drawn.len()), ([64, 64], 64 * 64 * 3));
    let expected = (&reference["image"].squeeze_dim(0) * 255.0).round().permute([1, 2, 0]).contiguous().to_kind(Kind::Int);
    let expected: Vec<i32> = expected.flatten(0, -1).try_into().unwrap();
    let apart = drawn.iter().zip(&expected).map(|(ours, theirs)| (i32::from(*ours) - theirs).abs()).max();
    assert!(apart <= Some(1), "{apart:?}");

    let decoder = png::Decoder::new(std::io::BufReader::new(std::fs::File::open(&picture).unwrap()));
    let mut reader = decoder.read_info().unwrap();
    reader.finish().unwrap();
    let texts = &reader.info().utf8_text;
    let text = |keyword: &str| texts.iter().find(|text| text.keyword == keyword).unwrap().get_text().unwrap();
    assert_eq!(text("Description"), "a picture of a cat face!");
    let settings: Value = serde_json::from_str(&text("sdxl-squeeze")).unwrap();
    assert_eq!(
        (settings["seed"].as_u64(), settings["steps"].as_u64(), settings["guidance"].as_f64()),
        (Some(231), Some(30), Some(4.0))
    );
}

#[test]
fn one_stage_in_memory_draws_the_same_picture() {
    let out = tempfile::tempdir().unwrap();
    let draw = |name: &str, more: &[&str]| {
        let path = out.path().join(name);
        generate("owl").with("--steps", "3").with("-o", &path).args(more).succeeds();
        pixels(&path).0
    };
    let usual = draw("a.png", &[]);
    assert_eq!(usual, draw("b.png", &["--low-memory"]));
    assert_eq!(usual, draw("c.png", &[]));
    assert_ne!(usual, draw("d.png", &["--seed", "1"]));
}

#[test]
fn a_prompt_that_is_cut_is_said() {
    let out = tempfile::tempdir().unwrap();
    let prompt = format!("{} and a violin", "red apple ".repeat(50));
    let ended = generate(&prompt).with("--steps", "1").with("-o", out.path().join("x.png")).succeeds();
    ended.says(&["WARN", "cut to 77 tokens", "and a violin"]);
}

#[test]
fn progress_is_written_as_json_or_not_at_all() {
    let out = tempfile::tempdir().unwrap();
    let run = generate("owl").with("--steps", "4").with("-o", out.path().join("x.png"));
    let text = run.clone().arg("--progress=json").succeeds().stderr;
    let events: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let steps: Vec<&Value> = events.iter().filter(|e| e["event"] == "advance" && e["task"] == "denoising").collect();
    assert_eq!(steps.len(), 4);
    assert!(steps.iter().all(|e| e["total"] == 4 && e["item"].as_str().unwrap().starts_with("timestep")));
    assert!(events.iter().all(|e| e["version"] == 1), "{text}");
    let count = |kind: &str| events.iter().filter(|e| e["event"] == kind).count();
    assert_eq!(count("begin"), count("end"));

    assert_eq!(run.args(["--quiet", "--overwrite"]).succeeds().stderr, "");
}

#[test]
fn warnings_and_errors_are_json_among_json_and_have_no_colours_elsewhere() {
    let out = tempfile::tempdir().unwrap();
    let run = |prompt: &str| generate(prompt).with("--steps", "1").arg("--overwrite").with("-o", out.path().join("x.png"));
    let long = "red apple ".repeat(50);
    let json = |text: &str| -> Vec<Value> { text.lines().map(|line| serde_json::from_str(line).unwrap()).collect() };
    let warned = json(&run(&long).arg("--progress=json").succeeds().stderr);
    assert!(warned.iter().any(|line| line["event"] == "log" && line["level"] == "warn" && line["version"] == 1));
    let refused = json(&run("owl").with("--device", "abacus").arg("--progress=json").ends_with(2).stderr);
    let [error] = &refused[..] else { panic!("{refused:?}") };
    assert!(error["event"] == "error" && error["text"].as_str().unwrap().contains("abacus"), "{error}");

    let plain = run(&long).succeeds().stderr;
    assert!(plain.contains("WARN") && !plain.contains('\u{1b}'), "{plain}");
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let command =
        format!("'{}' inspect '{}' | head -n 1; exit ${{PIPESTATUS[0]}}", env!("CARGO_BIN_EXE_sdxl-squeeze"), emoji().display());
    let output = Command::new("bash").args(["-c", &command]).output().unwrap();
    ended_with(0, &output);
}

#[test]
fn inspect_counts_the_bundled_model() {
    let inspect = Squeeze::new("inspect").arg(emoji());
    let counts: Value = inspect.clone().arg("--json").succeeds().json();
    assert_eq!(counts["parameters"], 8_371_780);
    assert_eq!(counts["bytes"], 2 * 8_371_780);
    assert_eq!(counts["dtype"], "F16");
    let stages = counts["stages"].as_array().unwrap();
    let names: Vec<&str> = stages.iter().map(|stage| stage["name"].as_str().unwrap()).collect();
    assert_eq!(names[0], "head");
    assert_eq!(names[4], "mid_block");
    assert_eq!(stages.iter().map(|stage| stage["layers"].as_array().unwrap().len()).sum::<usize>(), 264);
    assert_eq!(counts["parts"].as_array().unwrap().len(), 3);

    inspect.succeeds().says(&["down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q", "8,371,780 parameters"]);
}

/// The process starts itself again with the same arguments, and sets variables that OpenMP and MKL
/// read.
#[test]
#[cfg(target_os = "linux")]
fn compress_starts_again_with_its_environment() {
    let out = tempfile::tempdir().unwrap();
    let mut run = Command::new(env!("CARGO_BIN_EXE_sdxl-squeeze"))
        .args(["--quiet", "compress", "--config", "configs/dense-8bit.yaml", "--model"])
        .arg(emoji())
        .arg("--out")
        .arg(out.path())
        .env_remove("OMP_WAIT_POLICY")
        .env_remove("GOMP_SPINCOUNT")
        .env_remove("MKL_CBWR")
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let environment = format!("/proc/{}/environ", run.id());
    let mut settled = false;
    let status = loop {
        let variables = std::fs::read(&environment).unwrap_or_default();
        let has = |wanted: &[u8]| variables.split(|byte| *byte == 0).any(|variable| variable == wanted);
        settled |= has(b"GOMP_SPINCOUNT=5000") && has(b"MKL_CBWR=AUTO,STRICT");
        if let Some(status) = run.try_wait().unwrap() {
            break status;
        }
        std::thread::sleep(std::time::Duration::from_millis(5));
    };
    assert!(status.success() && settled, "{status}");
    assert!(out.path().join("unet.squeezed.safetensors").exists());
}

#[test]
fn completions_are_written_for_three_shells() {
    for (shell, words) in [("bash", "complete -F"), ("zsh", "#compdef sdxl-squeeze"), ("fish", "complete -c sdxl-squeeze")] {
        let script = Squeeze::new("completions").arg(shell).succeeds().stdout;
        assert!(script.contains(words) && script.contains("target-sparsity"), "{script}");
    }
    Squeeze::new("completions").arg("powershell").ends_with(2);
}

#[test]
fn every_command_has_a_man_page() {
    Squeeze::new("man").succeeds().says(&[".TH sdxl-squeeze 1", "compress"]);
    let out = tempfile::tempdir().unwrap();
    let folder = out.path().join("man1");
    Squeeze::new("man").out(&folder).succeeds();
    let compress = std::fs::read_to_string(folder.join("sdxl-squeeze-compress.1")).unwrap();
    assert!(compress.contains("sdxl\\-squeeze compress") && compress.contains("sequencing"), "{compress}");
    assert!(!compress.contains("granularity"), "a former name is not shown");
    assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 15);
}

#[test]
fn former_names_of_configs_and_flags_lead_to_the_present_ones() {
    let plan = |config: &str| Squeeze::new("plan").model(emoji()).arg(config);
    plan("configs/joint-s40-4bit-gs16.yaml").ends_with(2).says(&["configs/tutorial-s40-4bit-gs16.yaml"]);
    let former = plan("configs/dense-4bit.yaml").with("--granularity", "sublayer");
    former.succeeds().says(&["`--granularity` is called `--sequencing` now"]);
    former.with("--sequencing", "stage").ends_with(2).says(&["exclude each other"]);
}
