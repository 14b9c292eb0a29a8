//! Runs the programs in `examples/`, which `cargo test` builds before it runs the tests.

use std::path::{Path, PathBuf};
use std::process::Command;

/// Runs an example in the root of the repository and returns its standard output.
fn run(name: &str, arguments: &[&Path]) -> String {
    let test = std::env::current_exe().expect("a test knows its path");
    let profile = test.ancestors().nth(2).expect("tests lie in target/PROFILE/deps");
    let program = profile.join("examples").join(name);
    assert!(program.exists(), "{} is missing: run `cargo build --examples`", program.display());
    let output = Command::new(program)
        .args(arguments)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .env("OMP_WAIT_POLICY", "PASSIVE")
        .output()
        .expect("the example can be started");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{name} {arguments:?}: {}\n{errors}", output.status);
    String::from_utf8(output.stdout).expect("examples print UTF-8")
}

/// The number before `unit` in `text`.
fn number(text: &str, unit: &str) -> f64 {
    let before = text.split(unit).next().unwrap_or_else(|| panic!("no `{unit}` in: {text}"));
    let digits = before.split(|c: char| !c.is_ascii_digit() && c != '.').next_back();
    digits.and_then(|digits| digits.parse().ok()).unwrap_or_else(|| panic!("no number before `{unit}` in: {text}"))
}

#[test]
fn a_pipeline_is_compressed_read_exported_and_drawn() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| -> PathBuf { folder.path().join(name) };
    let (model, container) = (Path::new("models/emoji-sdxl"), path("unet.squeezed.safetensors"));
    let config = Path::new("configs/emoji/tutorial-4bit-gs16.yaml");

    let compressed = run("compress_pipeline", &[model, config, &container]);
    assert!(compressed.contains("4.08 bits a weight"), "{compressed}");
    let bytes = std::fs::metadata(&container).unwrap().len();
    assert_eq!(number(&compressed[compressed.find("written").unwrap()..], " bytes") as u64, bytes);

    let listed = run("read_container", &[&container]);
    assert_eq!(listed.lines().filter(|line| line.contains("0.0 % pruned, 4-bit palettes")).count(), 259, "{listed}");
    assert!(listed.contains("to_q.weight: 4096 values in fp16"), "{listed}");

    let package = path("unet.mlpackage");
    let exported = run("export_coreml", &[&container, &package]);
    assert!(exported.contains("259 compressed weights"), "{exported}");
    assert!(package.join("Manifest.json").exists());

    let prompt = Path::new("a picture of an owl!");
    let [dense, squeezed] = ["dense.png", "squeezed.png"].map(path);
    let drawn = run("generate", &[model, prompt, &dense]);
    assert!(drawn.contains("64x64 pixels, EulerDiscreteScheduler"), "{drawn}");
    run("generate", &[model, prompt, &squeezed, &container]);
    assert_ne!(std::fs::read(&dense).unwrap(), std::fs::read(&squeezed).unwrap());
}

#[test]
fn sparsegpt_loses_less_of_a_layer_than_magnitudes_do() {
    let printed = run("prune_one_layer", &[]);
    let lost = |method: &str| number(&printed[printed.find(method).unwrap() + method.len()..], " of the output");
    assert!(lost("SparseGPT") < 0.5 * lost("magnitude"), "{printed}");
}
