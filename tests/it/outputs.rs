//! Where outputs may go, what becomes of what is there, and what killed runs leave.
#![cfg(unix)]

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use crate::support::{copy, emoji, ended_with, repo, tiny};

fn run(args: &[&OsStr]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_sdxl-squeeze")).args(args).env("OMP_WAIT_POLICY", "PASSIVE").output().unwrap()
}

fn words<'a>(words: &[&'a dyn AsRef<OsStr>]) -> Vec<&'a OsStr> {
    words.iter().map(|word| (*word).as_ref()).collect()
}

fn base() -> PathBuf {
    repo("tests/golden/base-like")
}

/// Arguments of `generate` up to the outputs.
fn draw<'a>(model: &'a Path, more: &[&'a dyn AsRef<OsStr>]) -> Vec<&'a OsStr> {
    let first = ["generate", "--model"].map(OsStr::new);
    let rest = ["--prompt", "a cat", "--steps", "2"].map(OsStr::new);
    [&first[..], &[model.as_os_str()], &rest[..], &words(more)].concat()
}

fn refused(args: &[&OsStr], parts: &[&str]) {
    let said = ended_with(2, &run(args));
    let errors: Vec<&str> = said.lines().filter(|line| line.contains("error")).collect();
    assert_eq!(errors.len(), 1, "{said}");
    parts.iter().for_each(|part| assert!(errors[0].contains(part), "no `{part}` in: {said}"));
}

/// A container of the bundled model, and the config that it was made by.
fn container(folder: &Path) -> (PathBuf, PathBuf) {
    let config = folder.join("run.yaml");
    std::fs::write(&config, "solver: sequential\npalettize: {on_misfit: dense, global_config: {n_bits: 8}}\n").unwrap();
    let out = folder.join("made");
    ended_with(0, &run(&words(&[&"compress", &"--config", &config, &"--model", &emoji(), &"--out", &out])));
    (out.join("unet.squeezed.safetensors"), config)
}

#[test]
fn a_picture_goes_into_whatever_takes_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let base = base();
    let picture = folder.path().join("x.png");
    ended_with(0, &run(&draw(&base, &[&"-o", &picture])));
    let expected = std::fs::read(&picture).unwrap();

    let through = run(&draw(&base, &[&"-o", &"/dev/stdout"]));
    assert!(through.status.success() && through.stdout == expected);
    let script = r#"exec 3>"$1"; shift; "$0" "$@" -o /dev/fd/3"#;
    let path = folder.path().join("by-descriptor.png");
    let mut shell = Command::new("bash");
    shell.args(["-c", script, env!("CARGO_BIN_EXE_sdxl-squeeze")]).arg(&path).args(draw(&base, &[]));
    ended_with(0, &shell.output().unwrap());
    assert!(std::fs::read(&path).unwrap() == expected);

    let pipe = folder.path().join("pipe");
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let reader = Command::new("cat").arg(&pipe).stdout(Stdio::piped()).spawn().unwrap();
    ended_with(0, &run(&draw(&base, &[&"-o", &pipe])));
    assert!(reader.wait_with_output().unwrap().stdout == expected);
    assert!(std::fs::metadata(&pipe).unwrap().file_type().is_fifo());

    ended_with(0, &run(&draw(&base, &[&"-o", &"/dev/null", &"--latents-out", &"/dev/null"])));
    assert!(std::fs::metadata("/dev/null").unwrap().file_type().is_char_device());
    let full = ended_with(1, &run(&draw(&base, &[&"-o", &"/dev/full"])));
    assert!(full.contains("cannot write /dev/full: No space left"), "{full}");

    let (target, link) = (folder.path().join("target.png"), folder.path().join("link.png"));
    std::os::unix::fs::symlink(&target, &link).unwrap();
    for _ in 0..2 {
        ended_with(0, &run(&draw(&base, &[&"-o", &link])));
        assert!(link.is_symlink() && std::fs::read(&target).unwrap() == expected);
    }
    let socket = folder.path().join("socket");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    refused(&draw(&base, &[&"-o", &socket]), &["it is a socket"]);
    refused(&draw(&base, &[&"-o", &folder.path()]), &["it is a folder"]);
    refused(&draw(&base, &[&"-o", &folder.path().join("absent/x.png")]), &["there is no folder"]);
    refused(&words(&[&"synth", &"--preset", &"tiny", &"--out", &pipe]), &["is a pipe; name a new folder"]);
}

#[test]
fn no_output_destroys_an_input_or_another_output() {
    let folder = tempfile::tempdir().unwrap();
    let here = |name: &str| folder.path().join(name);
    let (container, config) = container(folder.path());
    let model = here("model");
    copy(&emoji(), &model);
    let before = std::fs::read(&container).unwrap();

    let (x, same) = (here("x.png"), folder.path().join("made/../x.png"));
    refused(&draw(&model, &[&"-o", &x, &"--latents-out", &same]), &["-o would write", "--latents-out"].map(|_| "x.png"));
    refused(&draw(&model, &[&"--unet", &container, &"-o", &container]), &["-o would write", "--unet reads"]);
    refused(&draw(&model, &[&"-o", &model.join("unet/config.json")]), &["--model reads"]);

    let inside = model.join("a/b");
    for out in [&model, &inside] {
        let args = words(&[&"export", &container, &"--to", &"diffusers", &"--model", &model, &"--out", out]);
        refused(&args, &["--out would write", "--model reads"]);
    }
    let package = model.join("unet/x.mlpackage");
    refused(&words(&[&"export", &model, &"--to", &"coreml", &"--out", &package]), &["--out would write"]);
    refused(&words(&[&"export", &container, &"--to", &"coremltools", &"--out", &container]), &["--out would write"]);

    let run = words(&[&"compress", &"--model", &model]);
    let compress = |more: Vec<&OsStr>, parts: &[&str]| refused(&[&run[..], &more].concat(), parts);
    compress(words(&[&"--config", &config, &"--out", &model.join("out")]), &["--out would write", "the model reads"]);
    let resolved = here("made/config.yaml");
    compress(words(&[&"--config", &resolved, &"--out", &here("made")]), &["config.yaml, but --config reads"]);
    let prompts = here("out/unet.squeezed.work/prompts.txt");
    std::fs::create_dir_all(prompts.parent().unwrap()).unwrap();
    std::fs::write(&prompts, "a cat\n").unwrap();
    let joint = repo("configs/tutorial-s40-4bit-gs16.yaml");
    compress(words(&[&"--config", &joint, &"--prompts", &prompts, &"--out", &here("out")]), &["the work folder would write"]);
    compress(words(&[&"--config", &joint, &"--samples-out", &joint, &"--out", &here("out")]), &["--samples-out would write"]);
    let judge = here("out/report.json");
    std::fs::write(&judge, "a dog\n").unwrap();
    let compare = words(&[&"compare", &config, &"--model", &model, &"--judge", &judge, &"--out"]);
    let out = here("out");
    refused(&[&compare[..], &words(&[&out])].concat(), &["report.json, but --judge reads"]);
    assert!(std::fs::read(&container).unwrap() == before && prompts.exists());
}

/// Names of everything that was left beside an output.
fn leftovers(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned());
    entries.filter(|name| name.contains(".partial-")).collect()
}

#[test]
fn the_next_run_removes_what_killed_runs_left() {
    let folder = tempfile::tempdir().unwrap();
    let (base, tiny) = (base(), tiny());
    let picture = folder.path().join("x.png");
    let (package, pipeline) = (folder.path().join("x.mlpackage"), folder.path().join("synthesized"));
    let runs = [
        draw(&base, &[&"-o", &picture]),
        words(&[&"export", &tiny, &"--to", &"coreml", &"--out", &package]),
        words(&[&"synth", &"--preset", &"tiny", &"--out", &pipeline]),
    ];
    let mut left = 0;
    for args in runs {
        let output = Path::new(args.last().unwrap());
        let remove = || {
            let _ = if output.is_dir() { std::fs::remove_dir_all(output) } else { std::fs::remove_file(output) };
        };
        let begin = Instant::now();
        ended_with(0, &run(&args));
        let time = begin.elapsed();
        for moment in 1..=8 {
            remove();
            let mut child = Command::new(env!("CARGO_BIN_EXE_sdxl-squeeze"))
                .args(&args)
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .unwrap();
            // Until there is something to leave, and for one of eight moments after that.
            let begin = Instant::now();
            while leftovers(folder.path()).is_empty() && begin.elapsed() < 2 * time && child.try_wait().unwrap().is_none() {
                std::thread::sleep(Duration::from_millis(1));
            }
            std::thread::sleep(time.mul_f64(f64::from(moment) / 40.0));
            let _ = child.kill();
            child.wait().unwrap();
            left += leftovers(folder.path()).len();
        }
        remove();
        ended_with(0, &run(&args));
        assert!(leftovers(folder.path()).is_empty(), "{args:?}: {:?}", leftovers(folder.path()));
        remove();
    }
    assert!(left > 0, "no kill left anything: nothing was tested");
}

/// Names of folders and files that are not UTF-8 work; only a run's config, which is text, cannot hold them.
#[test]
fn paths_that_are_not_text_work_or_are_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let here = |name: &[u8]| folder.path().join(OsStr::from_bytes(name));
    let (model, out) = (here(b"m\xff"), here(b"o\xff"));
    if std::fs::create_dir(&model).is_err() {
        // Some file systems have no such names.
        return;
    }
    copy(&emoji(), &model);
    std::fs::create_dir(&out).unwrap();
    let (picture, latents) = (out.join("x.png"), out.join(OsStr::from_bytes(b"l\xff")));
    ended_with(0, &run(&draw(&model, &[&"-o", &picture, &"--latents-out", &latents])));
    assert!(picture.exists() && latents.exists());
    ended_with(0, &run(&words(&[&"inspect", &model, &"--json"])));

    let (made, config) = container(folder.path());
    let bytes = |path: &Path| std::fs::read(path).unwrap();
    let copied = here(b"c\xff.safetensors");
    std::fs::copy(&made, &copied).unwrap();
    let said = ended_with(0, &run(&words(&[&"verify", &copied, &"--json"])));
    assert!(said.contains("\u{fffd}") && said.contains("\"version\""), "{said}");
    ended_with(0, &run(&words(&[&"inspect", &copied])));
    ended_with(0, &run(&draw(&model, &[&"--unet", &copied, &"-o", &picture])));
    let exported = here(b"e\xff");
    ended_with(0, &run(&words(&[&"export", &copied, &"--to", &"diffusers", &"--model", &model, &"--out", &exported])));
    assert!(exported.join("unet/diffusion_pytorch_model.safetensors").exists());
    let package = here(b"p\xff.mlpackage");
    ended_with(0, &run(&words(&[&"export", &model, &"--to", &"coreml", &"--out", &package])));
    ended_with(0, &run(&words(&[&"verify", &package])));
    ended_with(0, &run(&words(&[&"synth", &"--preset", &"tiny", &"--out", &here(b"s\xff")])));

    let own = here(b"r\xff.yaml");
    std::fs::copy(&config, &own).unwrap();
    let again = here(b"a\xff");
    ended_with(0, &run(&words(&[&"compress", &"--config", &own, &"--model", &emoji(), &"--out", &again])));
    assert!(bytes(&again.join("unet.squeezed.safetensors")) == bytes(&made));
    refused(&words(&[&"compress", &"--config", &own, &"--model", &model, &"--out", &again]), &["--model", "is not UTF-8"]);
    refused(&words(&[&"plan", &own, &"--model", &emoji(), &"--prompts", &out]), &["--prompts", "is not UTF-8"]);
}
