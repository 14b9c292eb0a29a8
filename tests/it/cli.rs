//! The commands as people use them.

use std::process::Command;

use serde_json::Value;
use tch::Kind;

use crate::support::{emoji, ended_with, relative_error, squeeze, tensors};

#[test]
fn generate_draws_the_reference_picture_and_says_how() {
    let out = tempfile::tempdir().unwrap();
    let (picture, latents) = (out.path().join("cat.png"), out.path().join("cat.safetensors"));
    let root = emoji();
    let said = ended_with(
        0,
        &squeeze(&[
            "generate",
            "--model",
            root.to_str().unwrap(),
            "--prompt",
            "a picture of a cat face!",
            "--seed",
            "231",
            "--guidance",
            "4",
            "--latents-out",
            latents.to_str().unwrap(),
            "-o",
            picture.to_str().unwrap(),
        ]),
    );
    assert!(said.contains("64x64, 30 steps of EulerDiscreteScheduler, seed 231"), "{said}");
    let reference = tensors(&root.join("reference.safetensors"));
    assert!(relative_error(&tensors(&latents)["latents"], &reference["final_latents"]) < 1e-4);

    let decoder = png::Decoder::new(std::io::BufReader::new(std::fs::File::open(&picture).unwrap()));
    let mut reader = decoder.read_info().unwrap();
    let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
    let frame = reader.next_frame(&mut pixels).unwrap();
    assert_eq!((frame.width, frame.height, pixels.len()), (64, 64, 64 * 64 * 3));
    let expected = (&reference["image"].squeeze_dim(0) * 255.0).round().permute([1, 2, 0]).contiguous().to_kind(Kind::Int);
    let expected: Vec<i32> = expected.flatten(0, -1).try_into().unwrap();
    let apart = pixels.iter().zip(&expected).map(|(ours, theirs)| (i32::from(*ours) - theirs).abs()).max();
    assert!(apart <= Some(1), "{apart:?}");

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
    let root = emoji();
    let draw = |name: &str, more: &[&str]| {
        let path = out.path().join(name);
        let mut args =
            vec!["generate", "--model", root.to_str().unwrap(), "--prompt", "owl", "--steps", "3", "-o", path.to_str().unwrap()];
        args.extend(more);
        ended_with(0, &squeeze(&args));
        let decoder = png::Decoder::new(std::io::BufReader::new(std::fs::File::open(&path).unwrap()));
        let mut reader = decoder.read_info().unwrap();
        let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
        reader.next_frame(&mut pixels).unwrap();
        pixels
    };
    let usual = draw("a.png", &[]);
    assert_eq!(usual, draw("b.png", &["--low-memory"]));
    assert_eq!(usual, draw("c.png", &[]));
    assert_ne!(usual, draw("d.png", &["--seed", "1"]));
}

#[test]
fn a_prompt_that_is_cut_is_said() {
    let out = tempfile::tempdir().unwrap();
    let root = emoji();
    let prompt = format!("{} and a violin", "red apple ".repeat(50));
    let path = out.path().join("x.png");
    let args = ["generate", "--model", root.to_str().unwrap(), "--prompt", &prompt, "--steps", "1", "-o", path.to_str().unwrap()];
    let said = ended_with(0, &squeeze(&args));
    assert!(said.contains("WARN") && said.contains("cut to 77 tokens") && said.contains("and a violin"), "{said}");
}

#[test]
fn progress_as_json_and_not_at_all() {
    let out = tempfile::tempdir().unwrap();
    let root = emoji();
    let path = out.path().join("x.png");
    let run = |flag: &str| {
        let args = [
            flag,
            "generate",
            "--model",
            root.to_str().unwrap(),
            "--prompt",
            "owl",
            "--steps",
            "4",
            "-o",
            path.to_str().unwrap(),
        ];
        squeeze(&args)
    };
    let output = run("--progress=json");
    ended_with(0, &output);
    let text = String::from_utf8(output.stderr).unwrap();
    let events: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let steps: Vec<&Value> = events.iter().filter(|e| e["event"] == "advance" && e["task"] == "denoising").collect();
    assert_eq!(steps.len(), 4);
    assert!(steps.iter().all(|e| e["total"] == 4 && e["item"].as_str().unwrap().starts_with("timestep")));
    assert!(events.iter().all(|e| e["version"] == 1), "{text}");
    let count = |kind: &str| events.iter().filter(|e| e["event"] == kind).count();
    assert_eq!(count("begin"), count("end"));

    assert!(run("--quiet").stderr.is_empty());
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
    let output = squeeze(&["inspect", emoji().to_str().unwrap(), "--json"]);
    ended_with(0, &output);
    let found: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(found["parameters"], 8_371_780);
    assert_eq!(found["bytes"], 2 * 8_371_780);
    assert_eq!(found["dtype"], "F16");
    let stages = found["stages"].as_array().unwrap();
    let names: Vec<&str> = stages.iter().map(|stage| stage["name"].as_str().unwrap()).collect();
    assert_eq!(names[0], "head");
    assert_eq!(names[4], "mid_block");
    assert_eq!(stages.iter().map(|stage| stage["layers"].as_array().unwrap().len()).sum::<usize>(), 264);
    assert_eq!(found["parts"].as_array().unwrap().len(), 3);

    let table = ended_with(0, &squeeze(&["inspect", emoji().to_str().unwrap()]));
    assert!(table.contains("down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"), "{table}");
    assert!(table.contains("8,371,780 parameters"));
}

/// The same process with its arguments, but for what OpenMP and MKL read.
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
fn completions_for_three_shells() {
    for (shell, words) in [("bash", "complete -F"), ("zsh", "#compdef sdxl-squeeze"), ("fish", "complete -c sdxl-squeeze")] {
        let output = squeeze(&["completions", shell]);
        ended_with(0, &output);
        let script = String::from_utf8(output.stdout).unwrap();
        assert!(script.contains(words) && script.contains("target-sparsity"), "{script}");
    }
    ended_with(2, &squeeze(&["completions", "powershell"]));
}

#[test]
fn a_man_page_for_each_command() {
    let page = ended_with(0, &squeeze(&["man"]));
    assert!(page.contains(".TH sdxl-squeeze 1") && page.contains("compress"), "{page}");
    let out = tempfile::tempdir().unwrap();
    let folder = out.path().join("man1");
    ended_with(0, &squeeze(&["man", "--out", folder.to_str().unwrap()]));
    let compress = std::fs::read_to_string(folder.join("sdxl-squeeze-compress.1")).unwrap();
    assert!(compress.contains("sdxl\\-squeeze compress") && compress.contains("sequencing"), "{compress}");
    assert!(!compress.contains("granularity"), "a former name is not shown");
    assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 11);
}

#[test]
fn former_names_of_configs_and_flags() {
    let root = emoji();
    let plan = |args: &[&str]| squeeze(&[&["plan", "--model", root.to_str().unwrap()], args].concat());
    let message = ended_with(2, &plan(&["configs/joint-s40-4bit-gs16.yaml"]));
    assert!(message.contains("configs/tutorial-s40-4bit-gs16.yaml"), "{message}");
    let dense = ["configs/dense-4bit.yaml", "--granularity", "sublayer"];
    let message = ended_with(0, &plan(&dense));
    assert!(message.contains("`--granularity` is called `--sequencing` now"), "{message}");
    let message = ended_with(2, &plan(&[&dense[..], &["--sequencing", "stage"]].concat()));
    assert!(message.contains("exclude each other"), "{message}");
}
