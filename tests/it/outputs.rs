//! The paths that outputs may have, what happens to existing files at these paths, and what killed
//! runs leave there.
#![cfg(unix)]

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::squeeze::Squeeze;
use crate::support::{copy, emoji, repo, tiny};

fn base() -> PathBuf {
    repo("tests/golden/base-like")
}

/// `generate` without a path for the picture.
fn draw(model: impl AsRef<Path>) -> Squeeze {
    Squeeze::new("generate").model(model).args(["--prompt", "a cat", "--steps", "2"])
}

/// `generate` into the picture `path`.
fn draw_into(model: impl AsRef<Path>, path: impl AsRef<Path>) -> Squeeze {
    draw(model).arg("-o").arg(path.as_ref())
}

/// `export --to FORMAT` of `source` into `path`.
fn export(source: impl AsRef<Path>, format: &str, path: impl AsRef<Path>) -> Squeeze {
    Squeeze::new("export").arg(source.as_ref()).args(["--to", format]).out(path)
}

/// `synth` of the tiny pipeline into `folder`.
fn synth(folder: impl AsRef<Path>) -> Squeeze {
    Squeeze::new("synth").args(["--preset", "tiny"]).out(folder)
}

/// `compress` with the config in the file `config`.
fn compress(config: impl AsRef<Path>, model: impl AsRef<Path>, out: impl AsRef<Path>) -> Squeeze {
    Squeeze::new("compress").arg("--config").arg(config.as_ref()).model(model).out(out)
}

/// Compresses the bundled model. Returns the paths of the container and of the config.
fn container(folder: &Path) -> (PathBuf, PathBuf) {
    let config = folder.join("run.yaml");
    std::fs::write(&config, "solver: sequential\npalettize: {on_misfit: dense, global_config: {n_bits: 8}}\n").unwrap();
    let out = folder.join("made");
    compress(&config, emoji(), &out).succeeds();
    (out.join("unet.squeezed.safetensors"), config)
}

#[test]
fn a_picture_goes_into_whatever_takes_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let base = base();
    let picture = folder.path().join("x.png");
    draw_into(&base, &picture).succeeds();
    let expected = std::fs::read(&picture).unwrap();

    let through = draw_into(&base, "/dev/stdout").command().output().unwrap();
    assert!(through.status.success() && through.stdout == expected);
    let path = folder.path().join("by-descriptor.png");
    draw(&base).in_shell(&format!(r#"exec 3>'{}'; "$0" "$@" -o /dev/fd/3"#, path.display()), 0);
    assert!(std::fs::read(&path).unwrap() == expected);

    let pipe = folder.path().join("pipe");
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let reader = Command::new("cat").arg(&pipe).stdout(Stdio::piped()).spawn().unwrap();
    draw_into(&base, &pipe).succeeds();
    assert!(reader.wait_with_output().unwrap().stdout == expected);
    assert!(std::fs::metadata(&pipe).unwrap().file_type().is_fifo());

    draw_into(&base, "/dev/null").args(["--latents-out", "/dev/null"]).succeeds();
    assert!(std::fs::metadata("/dev/null").unwrap().file_type().is_char_device());
    draw_into(&base, "/dev/full").ends_with(1).says(&["cannot write /dev/full: No space left"]);

    let (target, link) = (folder.path().join("target.png"), folder.path().join("link.png"));
    std::os::unix::fs::symlink(&target, &link).unwrap();
    for _ in 0..2 {
        draw_into(&base, &link).arg("--overwrite").succeeds();
        assert!(link.is_symlink() && std::fs::read(&target).unwrap() == expected);
    }
    let socket = folder.path().join("socket");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    draw_into(&base, &socket).is_refused(&["it is a socket"]);
    draw_into(&base, &folder).is_refused(&["it is a folder"]);
    draw_into(&base, folder.path().join("absent/x.png")).is_refused(&["there is no folder"]);
    synth(&pipe).is_refused(&["is a pipe; name a new folder"]);
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
    draw_into(&model, &x).arg("--latents-out").arg(&same).is_refused(&["x.png"]);
    draw_into(&model, &container).arg("--unet").arg(&container).is_refused(&["-o would write", "--unet reads"]);
    draw_into(&model, model.join("unet/config.json")).is_refused(&["--model reads"]);

    let inside = model.join("a/b");
    for out in [&model, &inside] {
        export(&container, "diffusers", out).model(&model).is_refused(&["--out would write", "--model reads"]);
    }
    let package = model.join("unet/x.mlpackage");
    export(&model, "coreml", &package).is_refused(&["--out would write"]);
    export(&container, "coremltools", &container).is_refused(&["--out would write"]);

    compress(&config, &model, model.join("out")).is_refused(&["--out would write", "the model reads"]);
    let resolved = here("made/resolved.yaml");
    compress(&resolved, &model, here("made")).is_refused(&["resolved.yaml, but --config reads"]);
    let prompts = here("out/unet.squeezed.work/prompts.txt");
    std::fs::create_dir_all(prompts.parent().unwrap()).unwrap();
    std::fs::write(&prompts, "a cat\n").unwrap();
    let joint = repo("configs/tutorial-s40-4bit-gs16.yaml");
    let run = compress(&joint, &model, here("out"));
    run.clone().arg("--prompts").arg(&prompts).is_refused(&["the work folder would write"]);
    run.arg("--samples-out").arg(&joint).is_refused(&["--samples-out would write"]);
    let judge = here("out/report.json");
    std::fs::write(&judge, "a dog\n").unwrap();
    let compare = Squeeze::new("compare").arg(&config).model(&model).arg("--judge").arg(&judge).out(here("out"));
    compare.is_refused(&["report.json, but --judge reads"]);
    assert!(std::fs::read(&container).unwrap() == before && prompts.exists());
}

/// The names of all temporary files and folders beside an output.
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
    let runs =
        [(draw_into(&base, &picture), &picture), (export(tiny, "coreml", &package), &package), (synth(&pipeline), &pipeline)];
    let mut left = 0;
    for (run, output) in runs {
        let remove = || {
            let _ = if output.is_dir() { std::fs::remove_dir_all(output) } else { std::fs::remove_file(output) };
        };
        let begin = Instant::now();
        run.succeeds();
        let time = begin.elapsed();
        for moment in 1..=8 {
            remove();
            let mut child = run.command().stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
            // The kill comes after the first temporary file exists, at one of eight moments.
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
        run.succeeds();
        assert!(leftovers(folder.path()).is_empty(), "{run:?}: {:?}", leftovers(folder.path()));
        remove();
    }
    assert!(left > 0, "no kill left anything: nothing was tested");
}

/// Names of folders and files that are not UTF-8 work; only a run's config, which is text, cannot
/// hold them.
#[test]
fn paths_that_are_not_text_work_or_are_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let here = |name: &[u8]| folder.path().join(OsStr::from_bytes(name));
    let (model, out) = (here(b"m\xff"), here(b"o\xff"));
    if std::fs::create_dir(&model).is_err() {
        // Some file systems do not allow such names.
        return;
    }
    copy(&emoji(), &model);
    std::fs::create_dir(&out).unwrap();
    let (picture, latents) = (out.join("x.png"), out.join(OsStr::from_bytes(b"l\xff")));
    draw_into(&model, &picture).arg("--latents-out").arg(&latents).succeeds();
    assert!(picture.exists() && latents.exists());
    Squeeze::new("inspect").arg(&model).arg("--json").succeeds();

    let (made, config) = container(folder.path());
    let bytes = |path: &Path| std::fs::read(path).unwrap();
    let copied = here(b"c\xff.safetensors");
    std::fs::copy(&made, &copied).unwrap();
    Squeeze::new("verify").arg(&copied).arg("--json").succeeds().says(&["\u{fffd}", "\"version\""]);
    Squeeze::new("inspect").arg(&copied).succeeds();
    draw_into(&model, &picture).arg("--unet").arg(&copied).arg("--overwrite").succeeds();
    let exported = here(b"e\xff");
    export(&copied, "diffusers", &exported).model(&model).succeeds();
    assert!(exported.join("unet/diffusion_pytorch_model.safetensors").exists());
    let package = here(b"p\xff.mlpackage");
    export(&model, "coreml", &package).succeeds();
    Squeeze::new("verify").arg(&package).succeeds();
    synth(here(b"s\xff")).succeeds();

    let renamed = here(b"r\xff.yaml");
    std::fs::copy(&config, &renamed).unwrap();
    let again = here(b"a\xff");
    compress(&renamed, emoji(), &again).succeeds();
    assert!(bytes(&again.join("unet.squeezed.safetensors")) == bytes(&made));
    compress(&renamed, &model, &again).is_refused(&["--model", "is not UTF-8"]);
    let plan = Squeeze::new("plan").arg(&renamed).model(emoji()).arg("--prompts").arg(&out);
    plan.is_refused(&["--prompts", "is not UTF-8"]);
}
