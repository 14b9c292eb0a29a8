//! The figures of `plan`, compared with those of runs and with published ones.

use std::path::Path;

use sdxl_squeeze::calibration::calibrate;
use sdxl_squeeze::compress::{self, Calibration, Gatherer, Job, Machine, Model, Workspace};
use sdxl_squeeze::config::RunConfig;
use sdxl_squeeze::device::Placement;
use sdxl_squeeze::model::unet::PartName;
use sdxl_squeeze::pipeline::PipelineFolder;
use sdxl_squeeze::plan::{Memory, Plan};
use sdxl_squeeze::progress::Silent;
use sdxl_squeeze::recipe::{Recipe, RunOptions, Sequencing};
use serde_json::Value;
use tch::{Device, Kind};

use crate::squeeze::Squeeze;
use crate::support::{container, emoji, repo, report, tiny};

/// `plan` of full-size SDXL at 512 pixels, without weights.
fn plan_of_sdxl() -> Squeeze {
    Squeeze::new("plan").args(["--architecture", "sdxl-base", "--height", "512", "--width", "512"])
}

#[test]
fn sdxls_sizes_are_the_tutorials_to_one_percent() {
    // The sizes in the tutorial's table in GiB (its GB and MB are GiB and MiB). They include the
    // Core ML program, 8.6 MiB.
    let table = [
        ("dense-8bit", 2.40),
        ("dense-6bit", 1.80),
        ("dense-4bit", 1.21),
        ("dense-4bit-gs4", 1.22),
        ("dense-4bit-gs16", 1.21),
        ("dense-4bit-gs32", 1.21),
        ("tutorial-s40-4bit-gs4", 1.04),
        ("tutorial-s40-4bit-gs16", 1.03),
        ("tutorial-s50-4bit-gs4", 942.0 / 1024.0),
        ("tutorial-s50-4bit-gs16", 933.0 / 1024.0),
    ];
    let plan = plan_of_sdxl().with("--memory-budget", "8GiB").arg("--json");
    let plans: Vec<Value> = plan.args(table.map(|(name, _)| repo(&format!("configs/{name}.yaml")))).succeeds().json();
    assert_eq!(plans.len(), table.len());
    for ((name, gib), entry) in table.iter().zip(plans) {
        assert_eq!(entry["config"], *name);
        let plan = &entry["plan"];
        let planned = plan["payload_bytes"].as_f64().unwrap() / f64::from(1 << 30) + 8.58 / 1024.0;
        assert!((planned / gib - 1.0).abs() < 0.01, "{name}: {planned:.4} GiB, the tutorial has {gib:.4}");
        let pruned: u64 = plan["stages"].as_array().unwrap().iter().map(|stage| stage["pruned"].as_u64().unwrap()).sum();
        assert_eq!(pruned, if name.starts_with("tutorial") { 788 } else { 0 }, "{name}");
        assert!(plan["peak_bytes"].as_u64().unwrap() <= 8 << 30, "{name}");
    }
}

/// Compresses `model` with few samples and more arguments, and returns the report.
fn compress(model: &Path, out: &Path, more: &[&str]) -> Value {
    Squeeze::new("compress").config("tutorial-s40-4bit-gs16").model(model).out(out).samples(2, 2).args(more).succeeds();
    report(out)
}

#[test]
fn the_budget_changes_the_passes_and_not_one_byte() {
    let folder = tempfile::tempdir().unwrap();
    let ample = compress(&emoji(), &folder.path().join("ample"), &[]);
    let planned = &ample["plan"];
    let bytes = |report: &Value| report["payload_bytes"].as_f64().unwrap();
    assert!((bytes(planned) / bytes(&ample) - 1.0).abs() < 1e-4, "the plan's bytes are the container's, but for ties");
    let sparsities = [planned, &ample].map(|report| report["sparsity"].as_f64().unwrap());
    assert!((sparsities[0] - sparsities[1]).abs() < 1e-4, "{sparsities:?}");
    assert_eq!(planned["carries"], "memory");
    let passes = |report: &Value| -> u64 {
        report["plan"]["stages"].as_array().unwrap().iter().map(|stage| stage["passes"].as_u64().unwrap()).sum()
    };
    assert_eq!(passes(&ample), 7);

    // A budget that is too small is refused with the smallest one that suffices. With that one the
    // run takes more passes.
    let config = repo("configs/tutorial-s40-4bit-gs16.yaml");
    let plan = Squeeze::new("plan").arg(config).model(emoji()).with("--prompts", repo("calibration/emoji.txt"));
    let ended = plan.args(["--calibration-nsamples", "2", "--memory-budget", "100MiB"]).ends_with(2);
    ended.says(&["are too little for stage"]);
    let refused = ended.text();
    let least = refused.split("; ").last().unwrap().split(" would do").next().unwrap().to_owned();
    let tight = compress(&emoji(), &folder.path().join("tight"), &["--memory-budget", &least]);
    assert_eq!(tight["plan"]["carries"], "files");
    assert!(passes(&tight) > 7, "{}", passes(&tight));
    let bytes = |name: &str| container(&folder.path().join(name));
    assert!(bytes("ample") == bytes("tight"), "{} passes gave other bytes", passes(&tight));
    assert!(!folder.path().join("tight/unet.squeezed.work").exists(), "the workspace is gone when the result is there");
}

/// Samples also pass through stages in which no layer is calibrated, so these stages must fit the
/// budget too.
#[test]
fn a_stage_that_is_only_run_must_fit_the_budget() {
    let folder = tempfile::tempdir().unwrap();
    let ends = folder.path().join("ends.yaml");
    let rules = "  module_name_configs:\n    '(time|add)_embedding.*':\n      n_bits: 4\n    '.*': null\n";
    std::fs::write(&ends, format!("palettize:\n{rules}")).unwrap();
    let plan = plan_of_sdxl().arg(&ends).with("--calibration-nsamples", "8");
    let refused = plan.clone().with("--memory-budget", "3GiB").ends_with(2).text();
    assert!(refused.contains("too little for stage `down_blocks.2`, which needs"), "{refused}");
    let least = refused.split("; ").last().unwrap().split(" would do").next().unwrap().to_owned();
    plan.with("--memory-budget", least).succeeds();
}

/// A run counts its passes over the samples and the multiply-adds of all forwards. For each way of
/// sequencing, with and without dense targets, they are those of the plan.
#[test]
fn what_is_computed_is_what_was_planned() {
    let folder = PipelineFolder::open(tiny()).unwrap();
    let weights = folder.unet_weights().unwrap();
    let mut config = RunConfig::read(&repo("configs/tutorial-s40-4bit-gs16.yaml")).unwrap();
    (config.calibration.calibration_nsamples, config.calibration.steps) = (5, Some(2));
    let options = RunOptions::on(Placement::CPU);
    let samples = calibrate(&folder, &weights, &config.calibration, &options, &Silent).unwrap();
    let recipe = Recipe::new(&config, &folder.unet).unwrap();
    let source = weights.narrow_source(Placement::CPU);
    let out = tempfile::tempdir().unwrap();
    let mut forwards = Vec::new();
    let orders = [Sequencing::Stage, Sequencing::Sublayer { dense_target: false }, Sequencing::Sublayer { dense_target: true }];
    for (number, sequencing) in orders.into_iter().enumerate() {
        let memory = Memory::new(8 << 30, Kind::Float, Device::Cpu);
        let plan = Plan::new(&folder.unet, &recipe.layers, sequencing, samples.shape(), memory, &|_| 4).unwrap();
        let job = Job {
            model: Model { chain: &folder.unet, source: &source },
            layers: &recipe.layers,
            plan: &plan,
            calibration: Calibration {
                samples: &samples,
                weights: &[],
                timesteps: &(0..1000).map(f64::from).collect::<Vec<_>>(),
            },
            machine: Machine { devices: &Device::Cpu.into(), kind: Kind::Float },
        };
        let mut store = Workspace::open(&out.path().join(number.to_string()), &Default::default(), false).unwrap();
        let statistics = compress::compress(&job, Gatherer::default(), &mut store, &Silent).unwrap();
        for (spec, stage) in folder.unet.stages().iter().zip(&plan.stages) {
            let computed = statistics.parts[&PartName::Stage(spec.name())];
            assert_eq!(computed.passes, stage.passes, "{sequencing:?}, {}", stage.name);
            let ratio = computed.multiply_adds / stage.work.forward;
            assert!((ratio - 1.0).abs() < 1e-9, "{sequencing:?}, {}: {ratio} of the planned forwards", stage.name);
        }
        forwards.push((plan.passes(), plan.work.forward));
    }
    // Sequencing by sublayer takes more passes than by stage, but hardly more forwards, because its
    // passes are through short units. Dense targets take more forwards, in as many passes.
    assert!(forwards[0].0 < forwards[1].0 && forwards[1].0 == forwards[2].0, "{forwards:?}");
    assert!(forwards[1].1 < 1.5 * forwards[0].1 && forwards[1].1 < forwards[2].1, "{forwards:?}");
}
