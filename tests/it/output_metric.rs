//! Polish of indices by the effect of errors on the network's output: `output_probes`.

use std::path::Path;

use crate::squeeze::Squeeze;
use crate::support::{repo, tiny};

/// The recipe of few bits in which errors are large.
const CONFIG: &str = "
calibration: {prompts: [owl, rocket, cat face, red apple], calibration_nsamples: 24, steps: 6}
solver: joint
sequencing: sublayer
target: dense
palettize:
  global_config: {n_bits: 2, granularity: per_tensor}
";

fn write(path: &Path, more: &str) {
    std::fs::write(path, format!("{CONFIG}{more}")).unwrap();
}

#[test]
fn the_error_of_the_network_is_lower() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    write(&at("plain.yaml"), "");
    write(&at("probed.yaml"), "joint: {output_probes: 24}\n");
    std::fs::write(at("judge.txt"), "umbrella\nguitar\nsnowman\n").unwrap();
    Squeeze::new("compare")
        .arg(at("plain.yaml"))
        .arg(at("probed.yaml"))
        .model(repo("models/emoji-sdxl"))
        .with("--judge", at("judge.txt"))
        .args(["--held-out", "12", "--no-noise-floor"])
        .out(at("out"))
        .succeeds();
    let report: serde_json::Value = serde_json::from_slice(&std::fs::read(at("out/report.json")).unwrap()).unwrap();
    let row = |number: usize| &report["rows"][number];
    let error = |number: usize| row(number)["unet_error"].as_f64().unwrap();
    assert!(error(1) < 0.98 * error(0), "{} with and {} without", error(1), error(0));
    assert_eq!(row(0)["payload_bytes"], row(1)["payload_bytes"]);
}

#[test]
fn the_plan_counts_the_metrics() {
    let plan = |probes: &str| {
        let plan = Squeeze::new("plan").arg(repo("configs/squeeze-4bit-gs16.yaml")).model(tiny());
        let text = plan.with("--output-probes", probes).args(["--json"]).succeeds().text();
        serde_json::from_str::<serde_json::Value>(&text).unwrap()[0]["plan"]["peak_bytes"].as_u64().unwrap()
    };
    assert!(plan("8") > plan("0"));
}
