//! Runs of the program with a byte budget, and with kinds of calibration that the tutorial does not
//! have.

use std::path::{Path, PathBuf};

use sdxl_squeeze::calibration::{Samples, weights};
use sdxl_squeeze::codebook::{BitWidth, Sparsity};
use sdxl_squeeze::config::{RunConfig, TimestepWeighting};
use sdxl_squeeze::pipeline::PipelineFolder;

use crate::squeeze::Squeeze;
use crate::support::{container, repo, report, tiny};

/// The settings of this project's own configs, `configs/squeeze-*.yaml`.
const ALL: [&str; 6] = ["--solver", "joint", "--sequencing", "sublayer", "--target", "dense"];

/// Compresses the tiny model by `config`, with few samples.
fn compress(config: impl AsRef<Path>, out: &Path) -> Squeeze {
    Squeeze::new("compress").config_file(config).model(tiny()).out(out).samples(10, 4)
}

fn s50() -> PathBuf {
    repo("configs/tutorial-s50-4bit-gs16.yaml")
}

/// [`s50`] for the middle of the network and its ends alone: a budget tries every setting of every
/// layer, and these are of every kind.
fn s50_of_the_middle(folder: &Path) -> PathBuf {
    let alone = "  module_name_configs: {'(up_blocks|down_blocks\\.2)\\..*': null}\n";
    let yaml = std::fs::read_to_string(s50()).unwrap().replace("  global_config:\n", &format!("{alone}  global_config:\n"));
    let path = folder.join("middle.yaml");
    std::fs::write(&path, yaml).unwrap();
    path
}

#[test]
fn a_budget_is_met_within_its_limits_by_a_recipe_that_can_be_run_again() {
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("budget.yaml");
    let yaml = "
solver: joint
prune:
  module_name_configs: {'mid_block\\.resnets\\.0\\.conv1': null}
palettize:
  global_config: {n_bits: 4, granularity: per_grouped_channel, group_size: 16}
  module_name_configs: {'mid_block\\.resnets\\.0\\.conv1': null}
  on_misfit: dense
budget: {target_bits: 4.0, min_bits: 3, max_sparsity: 0.4}
";
    std::fs::write(&config, yaml).unwrap();
    let out = folder.path().join("out");
    compress(&config, &out).succeeds();
    let report = report(&out);
    let bits = report["bits_per_weight"].as_f64().unwrap();
    assert!((3.9..=4.0).contains(&bits), "{bits} bits a weight");

    // The recipe has a rule for each layer and keeps to the limits. The layer that the config
    // leaves dense is not in the report.
    let recipe = RunConfig::read(&out.join("resolved.yaml")).unwrap();
    assert_eq!(recipe.budget, None);
    let (prune, palettize) = (recipe.prune.unwrap(), recipe.palettize.unwrap());
    let named = palettize.rules.module_name_configs.len();
    assert_eq!((named, prune.rules.module_name_configs.len()), (named, named));
    // The input block takes part.
    let patterns: Vec<String> =
        palettize.rules.module_name_configs.iter().map(|(pattern, _)| pattern.value.to_string()).collect();
    for layer in [r"time_embedding\.linear_2", r"add_embedding\.linear_1"] {
        assert!(patterns.iter().any(|pattern| pattern == layer), "no rule for `{layer}` among {patterns:?}");
    }
    let settings: Vec<_> = palettize.rules.module_name_configs.iter().filter_map(|(_, rule)| *rule).collect();
    assert!(settings.len() > 100 && settings.iter().all(|rule| rule.bits >= BitWidth::Three), "{settings:?}");
    assert!(settings.iter().any(|rule| rule.bits != settings[0].bits), "one setting for all");
    for (_, rule) in prune.rules.module_name_configs {
        assert!(rule.is_none_or(|rule| matches!(rule.sparsity, Sparsity::Unstructured(share) if share <= 0.4)), "{rule:?}");
    }
    let layers = report["layers"].as_array().unwrap();
    assert!(layers.iter().all(|layer| layer["name"] != "mid_block.resnets.0.conv1"));

    // The recipe gives the same bytes when it is run as a plain config.
    let again = folder.path().join("again");
    compress(out.join("resolved.yaml"), &again).succeeds();
    assert!(container(&again) == container(&out));
}

#[test]
fn too_few_bytes_are_refused_with_how_many_would_do() {
    let folder = tempfile::tempdir().unwrap();
    let config = s50_of_the_middle(folder.path());
    let with = |code, bytes: u64| {
        let out = folder.path().join(bytes.to_string());
        let run = compress(&config, &out).with("--solver", "joint").with("--target-size", format!("{bytes} B"));
        (run.ends_with(code).text(), out)
    };
    // It is found before anything is computed.
    let (refused, out) = with(2, 10_240);
    assert!(!out.exists());
    let plan = Squeeze::new("plan").arg(&config).model(tiny()).with("--solver", "joint").with("--target-size", "10240 B");
    plan.is_refused(&["(10,240 bytes) are too few: the smallest settings take "]);
    let least =
        refused.split("(10,240 bytes) are too few: the smallest settings take ").nth(1).unwrap_or_else(|| panic!("{refused}"));
    let digits: String = least.split(['(', ')']).nth(1).unwrap().chars().filter(char::is_ascii_digit).collect();
    let least = digits.parse().unwrap();
    let (_, out) = with(0, least);
    // Where several weights are equally small, the number of pruned weights can differ slightly
    // from the plan.
    let found = report(&out)["payload_bytes"].as_u64().unwrap();
    assert!(found <= least + least / 1000, "{found} of {least}");
}

#[test]
fn everything_at_once_gives_the_same_bytes_on_any_threads_and_when_it_is_killed() {
    let folder = tempfile::tempdir().unwrap();
    let captions = repo("calibration/emoji-captions.txt");
    let config = s50_of_the_middle(folder.path());
    let everything = |out: &Path| {
        compress(&config, out).args(ALL).with("--target-bits", "6").with("--output-probes", "2").with("--captions", &captions)
    };
    let on = |threads: &str| {
        let out = folder.path().join(threads);
        let begin = std::time::Instant::now();
        everything(&out).env("OMP_NUM_THREADS", threads).env("RAYON_NUM_THREADS", threads).succeeds();
        (container(&out), begin.elapsed())
    };
    let (two, time) = on("2");
    for threads in ["1", "3", "7"] {
        assert!(on(threads).0 == two, "{threads} threads and two give other bytes");
    }

    let out = folder.path().join("killed");
    let mut kills = 0;
    for moment in 1..=5 {
        let mut child = everything(&out).arg("--resume").starts();
        std::thread::sleep(time.mul_f64(f64::from(moment) / 6.0));
        kills += i32::from(child.try_wait().unwrap().is_none());
        let _ = child.kill();
        child.wait().unwrap();
    }
    everything(&out).arg("--resume").succeeds();
    assert!(container(&out) == two, "killed and resumed, other bytes");
    assert!(kills >= 2, "only {kills} of five runs were killed");
}

#[test]
fn captions_make_more_vectors_for_text_and_time() {
    let folder = tempfile::tempdir().unwrap();
    let vectors = |name: &str, more: &[&str]| {
        let out = folder.path().join(name);
        compress(s50(), &out).args(&ALL[..2]).args(more).succeeds();
        let report = report(&out);
        let layers = report["layers"].as_array().unwrap().clone();
        move |ending: &str| {
            let layer = layers.iter().find(|layer| layer["name"].as_str().unwrap().ends_with(ending)).unwrap();
            layer["vectors"].as_u64().unwrap()
        }
    };
    let captions = folder.path().join("captions.txt");
    std::fs::write(&captions, "owl\nrocket\na picture of a cat face!\n").unwrap();
    let plain = vectors("plain", &[]);
    let with = vectors("with", &["--captions", captions.to_str().unwrap()]);
    let [to_k, time, to_q] = ["attn2.to_k", "time_emb_proj", "attn2.to_q"];
    // A caption adds two texts of 77 states, because of guidance, and at each of four timesteps an
    // embedding for each of the two texts.
    assert_eq!(with(to_k) - plain(to_k), 3 * 2 * 77);
    assert_eq!(with(time) - plain(time), 3 * 4 * 2);
    assert_eq!(with(to_q), plain(to_q));
}

#[test]
fn timesteps_count_as_they_are_noisy_and_one_in_the_mean() {
    let folder = tempfile::tempdir().unwrap();
    let samples = folder.path().join("samples.safetensors");
    let out = folder.path().join("uniform");
    compress(s50(), &out).with("--samples-out", &samples).succeeds();
    let pipeline = PipelineFolder::open(tiny()).unwrap();
    let samples = Samples::read(&samples, pipeline.unet.config(), 10).unwrap();
    for by in [TimestepWeighting::Early, TimestepWeighting::Log] {
        let found = weights(&samples, &pipeline.scheduler, by).unwrap();
        assert!((found.iter().sum::<f64>() / found.len() as f64 - 1.0).abs() < 1e-12, "{found:?}");
        let mut order: Vec<_> = samples.calls.iter().map(|call| call.timestep).zip(&found).collect();
        order.sort_by(|a, b| a.0.total_cmp(&b.0));
        assert!(order.windows(2).all(|pair| pair[0].0 == pair[1].0 || pair[0].1 < pair[1].1), "{order:?}");
    }
    assert_eq!(weights(&samples, &pipeline.scheduler, TimestepWeighting::Uniform).unwrap(), vec![1.0; 10]);

    let config = folder.path().join("early.yaml");
    let yaml = std::fs::read_to_string(s50()).unwrap().replace("calibration:\n", "calibration:\n  timestep_weighting: early\n");
    std::fs::write(&config, yaml).unwrap();
    let early = folder.path().join("early");
    compress(&config, &early).succeeds();
    assert!(container(&early) != container(&out), "the weights change nothing");
}
