//! Snapshots of help, plans, tables and errors, in `tests/it/snapshots/`.
//!
//! After a deliberate change, `INSTA_UPDATE=always cargo test --test it -- snapshots` writes the
//! new texts, and `git diff` shows them.

use std::path::Path;

use regex::Regex;

use crate::squeeze::Squeeze;
use crate::support::emoji;

/// Compares `text` with the snapshot `name`. Parts that differ between machines are replaced first.
fn assert_snapshot(name: &str, text: &str) {
    let variable = [
        (r"\d+(\.\d+)? (s|min \d\d s|h \d\d min)\b", "[TIME]"),
        (r"(?m)peak memory \d+(\.\d+)? [KMG]iB$", "peak memory [MEMORY]"),
        // A container records the paths of its run, whose lengths differ.
        (r"MiB \([0-9,]+\)", "MiB ([BYTES])"),
        (r"\(build [0-9a-f]{16}\)", "(build [BUILD])"),
        // The width of a column depends on the replaced text.
        (r"(?m) +(\[TIME\]|time)$", " $1"),
        (r"(?m) +$", ""),
    ];
    let text = variable.iter().fold(text.to_owned(), |text, (pattern, replacement)| {
        Regex::new(pattern).expect("the pattern is valid").replace_all(&text, *replacement).into_owned()
    });
    insta::with_settings!({ prepend_module_to_snapshot => false, omit_expression => true }, {
        insta::assert_snapshot!(name, text);
    });
}

#[test]
fn the_help_of_each_command_is_as_reviewed() {
    let help = Squeeze::new("--help").succeeds().stdout;
    let commands = help.lines().skip_while(|line| *line != "Commands:").skip(1).take_while(|line| !line.is_empty());
    let commands: Vec<&str> = commands.filter_map(|line| line.split_whitespace().next()).collect();
    assert!(commands.contains(&"compress"), "{help}");
    assert_snapshot("help", &help);
    for command in commands.into_iter().filter(|command| *command != "help") {
        assert_snapshot(&format!("help-{command}"), &Squeeze::new(command).arg("--help").succeeds().stdout);
    }
}

#[test]
fn the_plan_of_full_size_sdxl_is_as_reviewed() {
    let plan = Squeeze::new("plan")
        .args(["configs/dense-4bit.yaml", "configs/squeeze-s40-4bit-gs16.yaml"])
        .args(["--architecture", "sdxl-base", "--height", "512", "--width", "512"])
        .args(["--calibration-nsamples", "8", "--memory-budget", "10GiB"]);
    assert_snapshot("plan", &plan.succeeds().stdout);
}

#[test]
fn the_table_of_a_model_is_as_reviewed() {
    assert_snapshot("inspect-model", &Squeeze::new("inspect").arg("models/emoji-sdxl").arg("--summary").succeeds().stdout);
}

#[test]
fn the_tables_of_a_run_and_its_container_are_as_reviewed() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let run = Squeeze::new("compress").arg("--quiet").config("dense-4bit-gs16").model(emoji()).out(&out).succeeds();
    let hide = |text: &str, path: &Path| text.replace(path.to_str().expect("temporary folders have ASCII names"), "[OUT]");
    assert_snapshot("compress", &hide(&run.stdout, &out));
    let container = out.join("unet.squeezed.safetensors");
    let verified = Squeeze::new("verify").arg(&container).succeeds();
    assert_snapshot("verify", &hide(&verified.stdout, &out));
    let inspected = Squeeze::new("inspect").arg(&container).succeeds();
    let first_rows: Vec<&str> = inspected.stdout.lines().take(12).collect();
    assert_snapshot("inspect-container", &hide(&first_rows.join("\n"), &out));
}

#[test]
fn errors_are_as_reviewed() {
    let config = "configs/dense-4bit.yaml";
    let runs = [
        ("no-command", Squeeze::new("--quiet")),
        ("unknown-command", Squeeze::new("compres")),
        ("unknown-flag", Squeeze::new("plan").arg("--bits")),
        ("no-config", Squeeze::new("compress").model("models/emoji-sdxl").out("out")),
        ("unknown-config", Squeeze::new("plan").arg("squeeze-s40-4bit-gs61").model("models/emoji-sdxl")),
        ("unknown-key", Squeeze::new("plan").arg("tests/attacks/config/key_unknown.yaml").model("models/emoji-sdxl")),
        ("number-that-is-none", Squeeze::new("plan").arg("tests/attacks/config/number_nan.yaml").model("models/emoji-sdxl")),
        ("no-model", Squeeze::new("plan").arg(config)),
        ("absent-model", Squeeze::new("plan").arg(config).model("absent")),
        ("absent-device", Squeeze::new("plan").arg(config).model("models/emoji-sdxl").args(["--device", "tpu"])),
        ("no-container", Squeeze::new("verify").arg("models/emoji-sdxl/unet/diffusion_pytorch_model.safetensors")),
        ("flag-of-another-format", Squeeze::new("export").args(["x", "--to", "diffusers", "--out", "y", "--batch", "1"])),
    ];
    let text: String = runs.iter().map(|(name, run)| format!("# {name}\n{}\n", run.ends_with(2).stderr)).collect();
    assert_snapshot("errors", &text);
}
