//! Tuning: runs of the program with a `tune` section.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use sdxl_squeeze::container::{CompressedWeight, Container, Values};

use crate::squeeze::{Squeeze, same_on_all_threads};
use crate::support::{container, report, tiny};

const PROMPTS: [&str; 12] =
    ["a cat", "a dog", "an owl", "a red apple", "a boat", "a guitar", "snow", "a rainbow", "a cactus", "a fox", "a ghost", "tea"];

/// A config with palettes, pruned layers, scales, layers that stay as they are, and a `tune`
/// section with `more` keys.
fn config(folder: &Path, more: &str) -> std::path::PathBuf {
    let path = folder.join("tune.yaml");
    let prompts = PROMPTS.map(|prompt| format!("'{prompt}'")).join(", ");
    let yaml = format!(
        "
solver: sequential
prune:
  algorithm: magnitude
  global_config: {{target_sparsity: 0.4}}
palettize:
  global_config: {{n_bits: 3, granularity: per_grouped_channel, group_size: 16}}
  module_type_configs: {{Conv2d: {{n_bits: 4, enable_per_channel_scale: true}}}}
  on_misfit: dense
calibration: {{prompts: ['a cat'], steps: 4, guidance: 4.0, calibration_nsamples: 4}}
tune: {{prompts: [{prompts}], nsamples: 40, steps: 6, batch: 3, learning_rate: 0.01{more}}}
"
    );
    std::fs::write(&path, yaml).unwrap();
    path
}

fn compress(config: &Path, out: &Path) -> Squeeze {
    Squeeze::new("compress").config_file(config).model(tiny()).out(out)
}

/// Everything of the container but the values of palettes and vectors.
fn fixed_parts(out: &Path) -> BTreeMap<String, CompressedWeight> {
    let container = Container::open(&out.join("unet.squeezed.safetensors")).unwrap();
    let names: Vec<String> = container.layers().map(|stored| stored.name).collect();
    let fixed = |name: String| {
        let mut weight = container.weight(&name).unwrap();
        if let Values::Palettized { codebook, .. } = &mut weight.values {
            codebook.palettes.clear();
        }
        (name, weight)
    };
    names.into_iter().map(fixed).collect()
}

#[test]
fn a_tuned_container_has_the_masks_indices_and_size_of_an_untuned_one_and_a_smaller_error() {
    let folder = tempfile::tempdir().unwrap();
    let config = config(folder.path(), "");
    let (tuned, untuned) = (folder.path().join("tuned"), folder.path().join("untuned"));
    let text = compress(&config, &tuned).succeeds().text();
    assert!(text.contains("12 prompts are few for `tune`"), "{text}");
    assert!(text.contains("tuning: the latents of held-out prompts were"), "{text}");
    let without = std::fs::read_to_string(&config).unwrap();
    let without: String = without.lines().filter(|line| !line.starts_with("tune:")).map(|line| format!("{line}\n")).collect();
    let plain = folder.path().join("plain.yaml");
    std::fs::write(&plain, without).unwrap();
    compress(&plain, &untuned).succeeds();

    assert_eq!(fixed_parts(&tuned), fixed_parts(&untuned));
    let (with, without) = (report(&tuned), report(&untuned));
    for key in ["payload_bytes", "sparsity", "bits_per_weight"] {
        assert_eq!(with[key], without[key], "{key}");
    }
    assert!(without.get("tuning").is_none());
    let judged = with["tuning"]["judged"].as_array().unwrap();
    let error = |entry: &serde_json::Value| entry[1].as_f64().unwrap();
    let best = judged.iter().map(error).fold(f64::INFINITY, f64::min);
    assert!(best < error(&judged[0]), "{judged:?}");
    assert_eq!(judged[0][0], 0);

    // It is a container like any other.
    let file = tuned.join("unet.squeezed.safetensors");
    Squeeze::new("verify").arg(&file).succeeds().says(&["every hash holds"]);
    let exported = folder.path().join("exported");
    Squeeze::new("export").arg(&file).with("--to", "diffusers").model(tiny()).out(&exported).succeeds();
    let package = folder.path().join("package.mlpackage");
    Squeeze::new("export").arg(&file).with("--to", "coreml").model(tiny()).out(&package).succeeds();
}

#[test]
fn tuning_that_makes_it_worse_changes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let wild = config(folder.path(), "");
    let text = std::fs::read_to_string(&wild).unwrap().replace("learning_rate: 0.01", "learning_rate: 5");
    std::fs::write(&wild, text).unwrap();
    let out = folder.path().join("out");
    compress(&wild, &out).succeeds().says(&["after 0 of", "so nothing is changed"]);
    // As it is without a step at all.
    let none = folder.path().join("none.yaml");
    let text = std::fs::read_to_string(&wild).unwrap().replace("learning_rate: 5", "learning_rate: 0");
    std::fs::write(&none, text).unwrap();
    let still = folder.path().join("still");
    compress(&none, &still).succeeds();
    let weights = |out: &Path| {
        let container = Container::open(&out.join("unet.squeezed.safetensors")).unwrap();
        let names: Vec<String> = container.layers().map(|stored| stored.name).collect();
        names.iter().map(|name| container.weight(name).unwrap()).collect::<Vec<_>>()
    };
    assert!(weights(&out) == weights(&still));
}

#[test]
fn the_same_bytes_on_any_number_of_threads() {
    let folder = tempfile::tempdir().unwrap();
    let config = config(folder.path(), "");
    let out = folder.path().join("out");
    same_on_all_threads(&["1", "2", "3"], &compress(&config, &out), || {
        let bytes = container(&out);
        std::fs::remove_dir_all(&out).unwrap();
        bytes
    });
}

/// Kills a run as soon as a state of its tuning is there, resumes it, and kills that one at its
/// next state, until it ends.
#[test]
fn killed_while_it_is_tuned_and_resumed_gives_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let config = config(folder.path(), "");
    let (whole, out) = (folder.path().join("whole"), folder.path().join("killed"));
    compress(&config, &whole).succeeds();
    let resume = compress(&config, &out).arg("--resume");
    let states = || -> Vec<Vec<u8>> {
        let name = |slot: usize| out.join(format!("unet.squeezed.work/tuning-{slot}.safetensors.sha256"));
        (0..2).filter_map(|slot| std::fs::read(name(slot)).ok()).collect()
    };
    let mut kills = 0;
    for _ in 0..3 {
        let before = states();
        let mut child = resume.starts();
        while states() == before && child.try_wait().unwrap().is_none() {
            std::thread::sleep(Duration::from_millis(2));
        }
        if child.try_wait().unwrap().is_none() {
            child.kill().unwrap();
            kills += 1;
        }
        child.wait().unwrap();
    }
    assert!(kills > 1, "{kills} kills");
    resume.succeeds();
    assert!(container(&out) == container(&whole));
    assert!(!out.join("unet.squeezed.work").exists());
}

#[test]
fn a_damaged_state_is_said_and_an_older_one_is_gone_on_with() {
    let folder = tempfile::tempdir().unwrap();
    let config = config(folder.path(), "");
    let (whole, out) = (folder.path().join("whole"), folder.path().join("damaged"));
    compress(&config, &whole).succeeds();
    let resume = compress(&config, &out).arg("--resume");
    let mut child = resume.starts();
    let state = out.join("unet.squeezed.work/tuning-0.safetensors");
    while !state.with_extension("safetensors.sha256").exists() && child.try_wait().unwrap().is_none() {
        std::thread::sleep(Duration::from_millis(2));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let mut bytes = std::fs::read(&state).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 16;
    std::fs::write(&state, bytes).unwrap();
    resume.succeeds().says(&["tuning-0.safetensors: is damaged"]);
    assert!(container(&out) == container(&whole));
}

/// Prompts that layers are tuned on say nothing about others: `compare` does not judge on them.
#[test]
fn what_is_judged_on_is_not_learned_from() {
    let folder = tempfile::tempdir().unwrap();
    let [config, judge, captions] = ["tune.yaml", "judge.txt", "captions.txt"].map(|name| folder.path().join(name));
    self::config(folder.path(), "");
    std::fs::write(&judge, "a volcano\na ghost\n").unwrap();
    std::fs::write(&captions, "a book\na volcano\n").unwrap();
    let tuned = std::fs::read_to_string(&config).unwrap();
    let compare = || {
        let run = Squeeze::new("compare").arg(&config).model(tiny()).with("--judge", &judge).out(folder.path().join("out"));
        run.arg("--no-noise-floor")
    };
    compare().is_refused(&["`a ghost` is judged on, so it cannot be tuned on"]);
    let solved = tuned.replace("'a ghost', ", "").replace("algorithm: magnitude", "algorithm: sparse_gpt");
    std::fs::write(&config, solved).unwrap();
    compare()
        .with("--captions", &captions)
        .is_refused(&["`a volcano` is judged on, so it cannot be a caption of the calibration"]);
    // Without prompts of its own the tuning has those of the calibration.
    let own = tuned.split("tune: {prompts: ").next().unwrap().replace("['a cat']", "['a cat', 'a volcano']");
    std::fs::write(&config, own + "tune: {nsamples: 40}\n").unwrap();
    compare().is_refused(&["`a volcano` is judged on, so it cannot be tuned on"]);
    assert!(!folder.path().join("out").exists());
}

#[test]
fn mistakes_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let refused = |from: &str, to: &str, says: &[&str]| {
        let path = config(folder.path(), "");
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.contains(from), "{from}");
        std::fs::write(&path, text.replace(from, to)).unwrap();
        compress(&path, &folder.path().join("out")).ends_with(2).says(says);
    };
    refused("steps: 6", "steps: 0", &["`steps` must be between 1"]);
    refused("batch: 3", "batches: 3", &["unknown key `batches` in tune", "did you mean `batch`?"]);
    refused("learning_rate: 0.01", "learning_rate: -1", &["`learning_rate` must be at least 0"]);
    refused("nsamples: 40", "timestep_weighting: early", &["`timestep_weighting` must be effect, or uniform"]);
    refused("tune: {prompts: [", "tune: {prompts: ['a cat'], nsamples: 3} #", &["`tune` has 1 prompts; it needs at least 10"]);
}
