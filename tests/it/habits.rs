//! What people expect of a command-line tool: no files of theirs replaced, no paths of theirs in
//! results, sizes that are no surprise, prompts of any form.

use std::path::Path;

use sdxl_squeeze::container::Container;

use crate::squeeze::Squeeze;
use crate::support::{copy, tiny};

/// Whether `needle` is in the file.
fn has(path: &Path, needle: &str) -> bool {
    std::fs::read(path).unwrap().windows(needle.len()).any(|window| window == needle.as_bytes())
}

/// A result is given to others: neither it nor the package of an app tells the folders of its
/// maker, and equal models in two places give equal results.
#[test]
fn results_hold_names_and_hashes_and_no_paths() {
    let folder = tempfile::tempdir().unwrap();
    let make = |user: &str| {
        let home = folder.path().join(user);
        copy(tiny(), &home.join("model"));
        let prompts = home.join("prompts.txt");
        std::fs::write(&prompts, "a cat\n").unwrap();
        let run = Squeeze::new("compress").config("emoji/tutorial-s50-4bit-gs16").model(home.join("model"));
        let run = run.with("--prompts", &prompts).args(["--calibration-nsamples", "2", "--steps", "2"]);
        run.out(home.join("out")).succeeds();
        home.join("out/unet.squeezed.safetensors")
    };
    let (one, other) = (make("jane.doe"), make("john.q.public"));
    assert!(!has(&one, "jane.doe"));
    assert!(std::fs::read(&one).unwrap() == std::fs::read(&other).unwrap());
    let container = Container::open(&one).unwrap();
    let recipe = &container.info().recipe;
    assert_eq!(
        (recipe["model"]["path"].as_str(), recipe["calibration"]["prompts"].as_str()),
        (Some("model"), Some("prompts.txt"))
    );
    assert_eq!(recipe["sha256"]["prompts"].as_str().map(str::len), Some(64));

    let package = folder.path().join("unet.mlpackage");
    Squeeze::new("export").arg(&one).with("--to", "coreml").out(&package).succeeds();
    assert!(!has(&package.join("Data/com.apple.CoreML/model.mlmodel"), "jane.doe"));
    let picture = folder.path().join("x.png");
    let draw = Squeeze::new("generate").model(folder.path().join("jane.doe/model")).with("--unet", &one);
    draw.args(["--prompt", "a cat", "--steps", "1"]).with("-o", &picture).succeeds();
    assert!(!has(&picture, "jane.doe"));
}

#[test]
fn a_users_own_files_are_not_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("config.yaml");
    let mine = "# my notes\nsolver: sequential\npalettize: {}\n";
    std::fs::write(&config, mine).unwrap();
    let run = || Squeeze::new("compress").config_file(&config).model(tiny()).out(folder.path());
    run().succeeds();
    assert_eq!(std::fs::read_to_string(&config).unwrap(), mine);
    let resolved = folder.path().join("resolved.yaml");
    assert!(has(&resolved, "The config as resolved by sdxl-squeeze"));
    // With leave, a run replaces what an earlier one wrote, and nothing else.
    run().is_refused(&["--out would replace ", "unet.squeezed.safetensors, which is there already", "--overwrite"]);
    let run = || run().arg("--overwrite");
    run().succeeds();
    std::fs::write(&resolved, mine).unwrap();
    run().is_refused(&["resolved.yaml was not written by this program", "name another --out"]);
    assert_eq!(std::fs::read_to_string(&resolved).unwrap(), mine);
    std::fs::remove_file(&resolved).unwrap();
    std::fs::write(folder.path().join("report.json"), "{}").unwrap();
    run().is_refused(&["report.json was not written by this program"]);
}

#[test]
fn no_command_replaces_a_file_without_leave() {
    let folder = tempfile::tempdir().unwrap();
    let there = folder.path().join("there");
    std::fs::write(&there, "mine").unwrap();
    let new = folder.path().join("new");
    let palettes = || Squeeze::new("compress").config("emoji/tutorial-4bit-gs16").model(tiny());
    let picture = || Squeeze::new("generate").model(tiny()).args(["--prompt", "a cat", "--steps", "1"]);
    let to_file = || Squeeze::new("export").arg(tiny()).with("--to", "single-file");
    let synth = || Squeeze::new("synth").args(["--preset", "tiny", "--single-file"]);
    for (command, flag) in [
        (palettes().out(&new).with("--samples-out", &there), "--samples-out"),
        (picture().with("-o", &there), "-o"),
        (picture().with("-o", &new).with("--latents-out", &there), "--latents-out"),
        (to_file().out(&there), "--out"),
        (synth().out(&there), "--out"),
        (Squeeze::new("configs").with("--profile", &there), "--profile"),
    ] {
        command.is_refused(&[flag, " would replace ", "there, which is there already", "add --overwrite"]);
        assert!(std::fs::read_to_string(&there).unwrap() == "mine" && !new.exists());
    }
    synth().out(&there).arg("--overwrite").succeeds();
    assert!(std::fs::metadata(&there).unwrap().len() > 4);
    let pages = || Squeeze::new("man").out(folder.path().join("pages"));
    pages().succeeds();
    pages().is_refused(&["sdxl-squeeze.1, which is there already"]);
    pages().arg("--overwrite").succeeds();

    // Layers that are solved are a result, too.
    let work = new.join("unet.squeezed.work");
    std::fs::create_dir_all(&work).unwrap();
    std::fs::write(work.join("run.json"), "{}").unwrap();
    palettes()
        .out(&new)
        .is_refused(&["unet.squeezed.work has an unfinished run", "--resume continues it, --overwrite begins anew"]);
    assert!(work.join("run.json").is_file());
}

#[test]
fn configs_that_compress_nothing_are_refused_and_those_that_enlarge_are_said() {
    let folder = tempfile::tempdir().unwrap();
    let run = |command: &str, yaml: &str| {
        let config = folder.path().join("c.yaml");
        std::fs::write(&config, yaml).unwrap();
        match command {
            "plan" => Squeeze::new("plan").arg(&config).model(tiny()),
            _ => Squeeze::new(command).config_file(&config).model(tiny()).out(folder.path().join("out")),
        }
    };
    let nothing =
        "palettize:\n  on_misfit: dense\n  global_config: {n_bits: 4, granularity: per_grouped_channel, group_size: 7}\n";
    for command in ["compress", "plan"] {
        run(command, nothing).is_refused(&["no layer of the UNet is left to compress"]);
    }
    let larger = "solver: sequential\npalettize:\n  weight_threshold: 0\n  global_config: {n_bits: 8, granularity: per_grouped_channel, group_size: 1}\n";
    for command in ["plan", "compress"] {
        let said = run(command, larger).succeeds();
        said.says(&["palettes make these layers larger than fp16", "bits a weight"]);
    }
    assert!(has(&folder.path().join("out/report.json"), "larger than fp16"));
}

#[test]
fn prompts_of_any_form_and_seeds_by_chance() {
    let folder = tempfile::tempdir().unwrap();
    let draw = |arguments: &[&str]| {
        let run =
            Squeeze::new("generate").model(tiny()).args(["--steps", "1", "--overwrite"]).with("-o", folder.path().join("x.png"));
        run.args(arguments).succeeds()
    };
    draw(&["--prompt", ""]);
    draw(&["--prompt", "-blurry"]);
    draw(&["--prompt", "a cat", "--negative-prompt", "-blurry"]);
    let seeds = [0, 1].map(|_| {
        let text = draw(&["--prompt", "a cat", "--seed", "-1"]).stdout;
        text.split("seed ").nth(1).unwrap().split(',').next().unwrap().parse::<u32>().unwrap()
    });
    assert_ne!(seeds[0], seeds[1]);
    let jpeg = Squeeze::new("generate").model(tiny()).args(["--prompt", "a cat", "-o", "x.jpg"]);
    jpeg.is_refused(&["-o x.jpg ends in .jpg", "end it in .png"]);

    // A prompt that is cut is said once, not once for each encoder, and in a few words.
    let long = draw(&["--prompt", &"rainbow ".repeat(5_000)]).stderr;
    assert_eq!(long.matches("is cut to 77 tokens").count(), 1, "{long}");
    assert!(long.len() < 1000, "{}", long.len());
}
