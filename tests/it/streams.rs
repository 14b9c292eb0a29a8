//! Standard streams that cannot be used, limits of the system, and a working directory that was
//! removed.
#![cfg(unix)]

use std::path::Path;

use crate::squeeze::Squeeze;
use crate::support::{copy, emoji, repo};

/// A small pipeline with an unknown key in its config, which causes a warning.
fn warned_of() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    copy(&repo("tests/golden/base-like"), folder.path());
    let path = folder.path().join("unet/config.json");
    let config = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, config.replacen('{', "{\"nobody_knows\": 1,", 1)).unwrap();
    folder
}

fn picture_of(model: &Path, picture: &Path) -> Squeeze {
    Squeeze::new("generate").model(model).with("--prompt", "a cat").with("--steps", "2").with("-o", picture)
}

#[test]
fn a_log_that_cannot_be_written_ends_nothing() {
    let model = warned_of();
    let picture = model.path().join("x.png");
    let draw = picture_of(model.path(), &picture);
    draw.succeeds().says(&["nobody_knows"]);
    let expected = std::fs::read(&picture).unwrap();
    for progress in ["auto", "json"] {
        // Standard error is a full device, a pipe whose reader has ended, or closed. In the last
        // case all three streams are closed.
        for script in [
            r#""$0" "$@" 2>/dev/full"#,
            r#""$0" "$@" 2> >(exit 0)"#,
            r#""$0" "$@" 2> >(head -n 1 >/dev/null)"#,
            r#""$0" "$@" 2>&-"#,
            r#""$0" "$@" 0<&- 1>&- 2>&-"#,
        ] {
            std::fs::remove_file(&picture).unwrap();
            draw.clone().with("--progress", progress).in_shell(script, 0);
            assert!(std::fs::read(&picture).unwrap() == expected, "{script}: another picture");
        }
    }
}

#[test]
fn a_result_that_cannot_be_written_is_a_failure() {
    let inspect = Squeeze::new("inspect").arg(emoji());
    for command in [
        Squeeze::new("--help"),
        Squeeze::new("--version"),
        Squeeze::new("help"),
        Squeeze::new("compress").arg("--help"),
        inspect.clone(),
        inspect.arg("--json"),
    ] {
        let said = command.in_shell(r#""$0" "$@" >/dev/full"#, 1).stderr;
        assert!(said.starts_with("sdxl-squeeze: error: cannot write standard output: No space left"), "{command:?}: {said}");
        assert_eq!(said.lines().count(), 1, "{said}");
        command.in_shell(r#""$0" "$@" | head -c 1 >/dev/null; exit ${PIPESTATUS[0]}"#, 0);
    }
    // A mistake of the command line gives the exit code 2, even if the message cannot be written.
    Squeeze::new("generate").in_shell(r#""$0" "$@" 2>/dev/full"#, 2);
    Squeeze::new("inspect").arg("/nowhere").in_shell(r#""$0" "$@" 2>/dev/full"#, 2);
}

#[test]
fn the_file_size_limit_is_a_failure_that_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let here = |name: &str| folder.path().join(name);
    let config = here("config.yaml");
    std::fs::write(&config, "solver: sequential\npalettize: {}\n").unwrap();
    let drawn = picture_of(&repo("tests/golden/base-like"), Path::new("x.png")).with("--latents-out", here("x.safetensors"));
    // The limits are in blocks of 1 KiB. The latents take less than one block, so their limit is 0.
    // A compression that fails keeps the layers that it has finished.
    for (command, limit, kept) in [
        (Squeeze::new("synth").with("--preset", "tiny").out(here("model")), 8, 1),
        (Squeeze::new("export").arg(emoji()).with("--to", "coreml").out("x.mlpackage"), 8, 1),
        (drawn, 0, 1),
        (Squeeze::new("compress").config_file(&config).model(emoji()).out(here("out")), 8, 2),
    ] {
        let said = command.folder(folder.path()).in_shell(&format!("ulimit -f {limit}; exec \"$0\" \"$@\""), 1).stderr;
        assert!(
            said.lines().any(|line| line.contains("error: ") && line.contains("cannot write") && line.contains("File too large")),
            "{said}"
        );
        let left: Vec<_> = std::fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left.len(), kept, "{left:?}");
        if kept > 1 {
            let work: Vec<_> = std::fs::read_dir(here("out")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
            assert_eq!(work, ["unet.squeezed.work"]);
        }
    }
}

#[test]
fn a_working_directory_that_is_gone_is_said_in_one_line() {
    let (model, nowhere) = (emoji(), Path::new("/dev/null"));
    let script = r#"folder=$(mktemp -d); cd "$folder"; rmdir "$folder"; exec "$0" "$@""#;
    for command in [Squeeze::new("inspect").arg(&model), Squeeze::new("plan").arg(&model), picture_of(&model, nowhere)] {
        let said = command.in_shell(script, 2).stderr;
        assert!(said.contains("the working directory is not there any more"), "{said}");
        assert_eq!(said.lines().count(), 1, "{said}");
    }
    Squeeze::new("--version").in_shell(script, 0);
}
