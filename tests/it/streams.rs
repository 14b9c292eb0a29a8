//! Standard streams that cannot be used, limits of the system, and a working directory that is
//! gone.
#![cfg(unix)]

use std::path::Path;
use std::process::{Command, Output};

use crate::support::{copy, emoji, ended_with, repo, squeezing};

/// The binary with the arguments `args` in the shell's words around it: `$0` is the program.
fn shell(script: &str, args: &[&str]) -> Output {
    let mut command = Command::new("bash");
    command.args(["-c", script, env!("CARGO_BIN_EXE_sdxl-squeeze")]).args(args).env("OMP_WAIT_POLICY", "PASSIVE");
    command.output().unwrap()
}

/// A small pipeline of which there is something to warn.
fn warned_of() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    copy(&repo("tests/golden/base-like"), folder.path());
    let path = folder.path().join("unet/config.json");
    let config = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, config.replacen('{', "{\"nobody_knows\": 1,", 1)).unwrap();
    folder
}

fn picture_of<'a>(model: &'a Path, picture: &'a Path) -> Vec<&'a str> {
    let (model, picture) = (model.to_str().unwrap(), picture.to_str().unwrap());
    vec!["generate", "--model", model, "--prompt", "a cat", "--steps", "2", "-o", picture]
}

#[test]
fn a_log_that_cannot_be_written_ends_nothing() {
    let model = warned_of();
    let picture = model.path().join("x.png");
    let args = picture_of(model.path(), &picture);
    let said = ended_with(0, &squeezing(&args).output().unwrap());
    assert!(said.contains("nobody_knows"), "{said}");
    let expected = std::fs::read(&picture).unwrap();
    for progress in ["auto", "json"] {
        // A full device, a reader that has gone away, a descriptor that is closed, and all three
        // closed.
        for script in [
            r#""$0" "$@" 2>/dev/full"#,
            r#""$0" "$@" 2> >(exit 0)"#,
            r#""$0" "$@" 2> >(head -n 1 >/dev/null)"#,
            r#""$0" "$@" 2>&-"#,
            r#""$0" "$@" 0<&- 1>&- 2>&-"#,
        ] {
            std::fs::remove_file(&picture).unwrap();
            ended_with(0, &shell(script, &[&args[..], &["--progress", progress]].concat()));
            assert!(std::fs::read(&picture).unwrap() == expected, "{script}: another picture");
        }
    }
}

#[test]
fn a_result_that_cannot_be_written_is_a_failure() {
    let emoji = emoji();
    let model = emoji.to_str().unwrap();
    for args in
        [&["--help"][..], &["--version"], &["help"], &["compress", "--help"], &["inspect", model], &["inspect", model, "--json"]]
    {
        let said = ended_with(1, &shell(r#""$0" "$@" >/dev/full"#, args));
        assert!(said.starts_with("sdxl-squeeze: error: cannot write standard output: No space left"), "{args:?}: {said}");
        assert_eq!(said.lines().count(), 1, "{said}");
        ended_with(0, &shell(r#""$0" "$@" | head -c 1 >/dev/null; exit ${PIPESTATUS[0]}"#, args));
    }
    // Mistakes of the command line keep their code, whether anybody reads of them or not.
    ended_with(2, &shell(r#""$0" "$@" 2>/dev/full"#, &["generate"]));
    ended_with(2, &shell(r#""$0" "$@" 2>/dev/full"#, &["inspect", "/nowhere"]));
}

#[test]
fn the_file_size_limit_is_a_failure_that_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let here = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (base, emoji) = (repo("tests/golden/base-like"), emoji());
    let config = here("config.yaml");
    std::fs::write(&config, "solver: sequential\npalettize: {}\n").unwrap();
    let (synth, latents, out) = (here("model"), here("x.safetensors"), here("out"));
    let runs = [
        vec!["synth", "--preset", "tiny", "--out", &synth],
        vec!["export", emoji.to_str().unwrap(), "--to", "coreml", "--out", "x.mlpackage"],
        [picture_of(&base, Path::new("x.png")), vec!["--latents-out", &latents]].concat(),
        vec!["compress", "--config", &config, "--model", emoji.to_str().unwrap(), "--out", &out],
    ];
    for args in runs {
        // In blocks of 1 KiB; what the latents take is less than that.
        let limit = if args[0] == "generate" { 0 } else { 8 };
        let mut command = Command::new("bash");
        let script = format!("ulimit -f {limit}; exec \"$0\" \"$@\"");
        command.args(["-c", &script, env!("CARGO_BIN_EXE_sdxl-squeeze")]).args(&args).current_dir(folder.path());
        let said = ended_with(1, &command.output().unwrap());
        assert!(
            said.lines().any(|line| line.contains("error: ") && line.contains("cannot write") && line.contains("File too large")),
            "{said}"
        );
        let left: Vec<_> = std::fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        // A compression keeps what it has finished.
        let wanted = if args[0] == "compress" { 2 } else { 1 };
        assert_eq!(left.len(), wanted, "{args:?} left {left:?}");
        if args[0] == "compress" {
            let work: Vec<_> = std::fs::read_dir(here("out")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
            assert_eq!(work, ["unet.squeezed.work"]);
        }
    }
}

#[test]
fn a_working_directory_that_is_gone_is_said_in_one_line() {
    let emoji = emoji();
    let model = emoji.to_str().unwrap();
    let script = r#"folder=$(mktemp -d); cd "$folder"; rmdir "$folder"; exec "$0" "$@""#;
    for args in [&["inspect", model][..], &["plan", model], &["generate", "--model", model, "--prompt", "x", "-o", "/dev/null"]] {
        let said = ended_with(2, &shell(script, args));
        assert!(said.contains("the working directory is not there any more"), "{said}");
        assert_eq!(said.lines().count(), 1, "{said}");
    }
    ended_with(0, &shell(script, &["--version"]));
}
