//! The main steps through the program: compress, verify, inspect, export, and draw with the
//! container.

use std::path::Path;

use sdxl_squeeze::calibration::calibrate;
use sdxl_squeeze::compress::{Calibration, Gatherer, Job, LayerReport, Machine, Model, Workspace};
use sdxl_squeeze::config::RunConfig;
use sdxl_squeeze::container::{CompressedWeight, Container};
use sdxl_squeeze::device::Placement;
use sdxl_squeeze::model::unet::Unet;
use sdxl_squeeze::pipeline::PipelineFolder;
use sdxl_squeeze::plan::{Memory, Plan};
use sdxl_squeeze::progress::Silent;
use sdxl_squeeze::recipe::{Recipe, RunOptions};
use serde_json::Value;
use tch::{Device, Kind};

use crate::squeeze::Squeeze;
use crate::support::{emoji, pixels, repo, report, tensors, tiny};

/// Compresses the bundled model by `configs/CONFIG.yaml`, with few samples.
fn compress(config: &str, out: &Path) -> Squeeze {
    Squeeze::new("compress").config(config).model(emoji()).out(out).samples(6, 4)
}

#[test]
fn pruned_and_palettized_end_to_end() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("s40");
    let ended = compress("tutorial-s40-4bit-gs16", &out).succeeds();
    let report = report(&out);
    // What many layers share is said once while the run goes on, once at the end, and of each layer
    // in the report.
    let lines = |text: &str| text.lines().filter(|line| line.contains("fewer than its")).count();
    assert_eq!((lines(&ended.stderr), lines(&ended.stdout)), (1, 1), "{ended}");
    ended.says(&[" layers, down_blocks.0.resnets.0.time_emb_proj to "]);
    let noted =
        report["notes"].as_array().unwrap().iter().filter(|note| note.as_str().unwrap().contains("fewer than its")).count();
    assert!(noted > 20, "{noted} notes in the report");
    assert_eq!(report["samples"], 6);
    let layers = report["layers"].as_array().unwrap();
    for layer in layers.iter().filter(|layer| layer["vectors"].is_u64()) {
        let sparsity = layer["sparsity"].as_f64().unwrap();
        assert!((0.4..0.4025).contains(&sparsity), "{}: {sparsity}", layer["name"]);
        let errors = &layer["errors"];
        // Where a group has few distinct values, palettes add no error. The two errors are summed
        // in different orders, so they may differ slightly.
        assert!(errors["pruned_output"].as_f64().unwrap() <= 1.001 * errors["output"].as_f64().unwrap(), "{layer}");
    }

    // The container is undamaged, and `inspect` lists its layers.
    let file = out.join("unet.squeezed.safetensors");
    Squeeze::new("verify").arg(&file).succeeds().says(&["every hash holds"]);
    assert_eq!(report["bytes"].as_u64().unwrap(), std::fs::metadata(&file).unwrap().len());
    Squeeze::new("inspect").arg(&file).succeeds().says(&["down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"]);

    // The resolved config is a valid config and gives the same bytes.
    let again = folder.path().join("again");
    Squeeze::new("compress").config_file(out.join("resolved.yaml")).model(emoji()).out(&again).succeeds();
    assert!(
        std::fs::read(again.join("unet.squeezed.safetensors")).unwrap() == std::fs::read(&file).unwrap(),
        "another run, other bytes"
    );

    // A picture drawn with the container equals one drawn with the exported folder.
    let exported = folder.path().join("exported");
    Squeeze::new("export").arg(&file).with("--to", "diffusers").model(emoji()).out(&exported).succeeds();
    let draw = |name: &str, model: Squeeze| {
        let path = folder.path().join(name);
        model.args(["--prompt", "owl", "--steps", "4"]).with("-o", &path).succeeds();
        pixels(&path).0
    };
    let generate = |model: &Path| Squeeze::new("generate").model(model);
    let straight = draw("a.png", generate(&emoji()).with("--unet", &file));
    assert_eq!(straight, draw("b.png", generate(&exported)));
    assert_ne!(straight, draw("c.png", generate(&emoji())));
}

/// The mean of ‖X W - X W'‖² / ‖X W‖² over the calibrated layers.
fn mean_error(report: &Value) -> f64 {
    let layers = report["layers"].as_array().unwrap().iter();
    let errors: Vec<f64> = layers.filter_map(|layer| layer["errors"]["output"].as_f64()).collect();
    errors.iter().sum::<f64>() / errors.len() as f64
}

#[test]
fn the_joint_solver_stores_the_same_bytes_and_loses_less() {
    let folder = tempfile::tempdir().unwrap();
    let run = |name: &str, config: &str, more: &[&str]| {
        let out = folder.path().join(name);
        compress(config, &out).args(more).succeeds();
        report(&out)
    };
    let s40 = "tutorial-s40-4bit-gs16";
    let sequential = run("sequential", s40, &[]);
    let joint = run("joint", s40, &["--solver", "joint", "--sequencing", "stage"]);
    let bytes = |report: &Value| report["payload_bytes"].as_f64().unwrap();
    assert!((bytes(&joint) - bytes(&sequential)).abs() < 8.0);
    let share = |report: &Value| report["sparsity"].as_f64().unwrap();
    // The number of pruned weights is rounded block by block, so the solvers may differ by one or
    // two weights.
    assert!((share(&joint) - share(&sequential)).abs() < 1e-5);
    assert!(mean_error(&joint) < 0.8 * mean_error(&sequential), "{} and {}", mean_error(&joint), mean_error(&sequential));

    // The joint solver also calibrates palettes without pruning, and the layers outside of the
    // stages.
    let dense = run("dense", "dense-4bit-gs16", &["--solver", "joint"]);
    assert_eq!(dense["samples"], 6);
    for layer in dense["layers"].as_array().unwrap() {
        assert!(layer["vectors"].is_u64() && layer["errors"]["output"].is_f64(), "{layer}");
    }
    let plain = run("plain", "dense-4bit-gs16", &[]);
    assert_eq!(dense["payload_bytes"], plain["payload_bytes"]);
}

#[test]
fn dense_palettes_need_no_calibration_and_keep_their_order() {
    let folder = tempfile::tempdir().unwrap();
    let mut errors = Vec::new();
    let mut sizes = Vec::new();
    for name in ["dense-8bit", "dense-6bit", "dense-4bit-gs4", "dense-4bit-gs16", "dense-4bit-gs32", "dense-4bit"] {
        let out = folder.path().join(name);
        compress(name, &out).succeeds();
        let report = report(&out);
        assert_eq!(report["samples"], 0);
        // The squared error of each weight is relative to the weight's squared norm.
        let layers = report["layers"].as_array().unwrap();
        let error: f64 = layers.iter().map(|layer| layer["errors"]["weight"].as_f64().unwrap()).sum();
        errors.push(error);
        sizes.push(report["payload_bytes"].as_u64().unwrap());
    }
    assert!(errors.windows(2).all(|pair| pair[0] < pair[1]), "8 < 6 < 4 bits, gs4 < gs16 < gs32 < per tensor: {errors:?}");
    assert!(
        sizes[0] > sizes[1] && sizes[1] > sizes[2] && sizes[2] > sizes[3] && sizes[3] > sizes[4] && sizes[4] > sizes[5],
        "{sizes:?}"
    );
}

#[test]
fn the_container_decodes_to_the_exported_weights_bit_for_bit() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("run");
    compress("tutorial-2of4-4bit-gs16", &out).succeeds();
    let file = out.join("unet.squeezed.safetensors");
    let exported = folder.path().join("exported");
    Squeeze::new("export").arg(&file).with("--to", "diffusers").model(emoji()).out(&exported).succeeds();
    let written = tensors(&exported.join("unet/diffusion_pytorch_model.safetensors"));
    let container = Container::open(&file).unwrap();
    for layer in container.layers() {
        let ours = tch::Tensor::from_slice(&container.decode(&layer.name).unwrap()).view(layer.shape.as_slice());
        assert_eq!(ours, written[&layer.name], "{}", layer.name);
        if layer.sparsity > 0.1 {
            assert_eq!(layer.sparsity, 0.5, "{}: 2 of every 4", layer.name);
        }
    }
    // The exported folder is a pipeline whose UNet can be loaded.
    let pipeline = PipelineFolder::open(&exported).unwrap();
    let weights = pipeline.unet_weights().unwrap();
    Unet::resident(pipeline.unet.clone(), weights.source(Placement::CPU), &Silent).unwrap();
}

#[test]
fn samples_can_be_kept_and_used_again() {
    let folder = tempfile::tempdir().unwrap();
    let samples = folder.path().join("samples.safetensors");
    let out = |name: &str| folder.path().join(name);
    let s50 = "tutorial-s50-4bit-gs16";
    compress(s50, &out("a")).with("--samples-out", &samples).succeeds();
    let again = Squeeze::new("compress").config(s50).model(emoji()).out(out("b")).with("--samples", &samples);
    let again = again.with("--calibration-nsamples", "6");
    again.succeeds();
    let weight = |name: &str| {
        let container = Container::open(&out(name).join("unet.squeezed.safetensors")).unwrap();
        container.decode("mid_block.resnets.0.conv1.weight").unwrap()
    };
    assert_eq!(weight("a"), weight("b"));

    // Damaged samples are refused.
    let bytes = std::fs::read(&samples).unwrap();
    std::fs::write(&samples, &bytes[..bytes.len() / 2]).unwrap();
    again.arg("--overwrite").ends_with(2).says(&["not a whole safetensors file"]);
}

#[test]
fn what_cannot_be_done_is_said() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("x");
    let run = Squeeze::new("compress").config("tutorial-s40-4bit-gs16").out(&out);
    run.ends_with(2).says(&["which model?"]);
    run.clone().model("/nowhere").ends_with(2).says(&["cannot read"]);
    let run = run.model(emoji());
    run.clone().with("--target-sparsity", "1.0").ends_with(2).says(&["--target-sparsity"]);
    run.clone().with("--n-bits", "5").ends_with(2).says(&["--n-bits"]);
    run.with("--prompts", "/nowhere/prompts.txt").ends_with(2).says(&["/nowhere/prompts.txt"]);

    // Two mistakes in a config are reported in two lines, each with its place.
    let bad = folder.path().join("bad.yaml");
    std::fs::write(&bad, "palettize:\n  global_config:\n    n_bits: 5\n    granularty: per_tensor\n").unwrap();
    let ended = Squeeze::new("compress").config_file(&bad).model(emoji()).out(&out).ends_with(2);
    ended.says(&[":3:", ":4:", "granularity"]);
    assert_eq!(ended.text().lines().count(), 2, "{ended}");
}

#[test]
fn compare_judges_on_prompts_that_calibration_has_not_seen() {
    let folder = tempfile::tempdir().unwrap();
    let (judge, out) = (folder.path().join("judge.txt"), folder.path().join("out"));
    std::fs::write(&judge, "owl\nrocket\n").unwrap();
    Squeeze::new("compare")
        .args(["dense-8bit", "dense-4bit"].map(|name| repo(&format!("configs/{name}.yaml"))))
        .model(emoji())
        .with("--judge", &judge)
        .with("--prompts", repo("calibration/emoji.txt"))
        .args(["--steps", "3", "--held-out", "4"])
        .out(&out)
        .succeeds();
    let report = report(&out);
    let number = |row: usize, key: &str| report["rows"][row][key].as_f64().unwrap();
    assert!(number(0, "unet_error") < 0.1 * number(1, "unet_error"));
    assert!(report["rows"][0]["psnr"]["mean"].as_f64() > report["rows"][1]["psnr"]["mean"].as_f64());
    assert!(number(0, "bytes") > 1.8 * number(1, "bytes"));
    assert_eq!(report["rows"][0]["stages"].as_array().unwrap().len(), 7);
    assert!(std::fs::read_to_string(out.join("report.html")).unwrap().contains("dense-4bit"));
    assert!(out.join("sheet.png").is_file());
}

/// The CPU solves layers of one shape in batches of several sizes, as a GPU does.
#[test]
fn layers_in_batches_are_those_one_by_one() {
    let folder = PipelineFolder::open(tiny()).unwrap();
    let weights = folder.unet_weights().unwrap();
    let mut config = RunConfig::read(&repo("configs/tutorial-s40-4bit-gs16.yaml")).unwrap();
    (config.calibration.calibration_nsamples, config.calibration.steps) = (4, Some(2));
    config.palettize = None;
    let options = RunOptions::on(Placement::CPU);
    let samples = calibrate(&folder, &weights, &config.calibration, &options, &Silent).unwrap();
    let recipe = Recipe::new(&config, &folder.unet).unwrap();
    let source = weights.narrow_source(Placement::CPU);
    let out = tempfile::tempdir().unwrap();
    let run = |batch_bytes: u64| -> Vec<(LayerReport, CompressedWeight)> {
        let memory = Memory::new(8 << 30, Kind::Float, Device::Cpu);
        let (recipes, sequencing) = (&recipe.layers, recipe.sequencing);
        let mut plan = Plan::new(&folder.unet, recipes, sequencing, samples.shape(), memory, &|_| 4).unwrap();
        assert_eq!(plan.batch_bytes, 0);
        plan.batch_bytes = batch_bytes;
        let job = Job {
            model: Model { chain: &folder.unet, source: &source },
            layers: recipes,
            plan: &plan,
            calibration: Calibration {
                samples: &samples,
                weights: &[],
                timesteps: &(0..1000).map(f64::from).collect::<Vec<_>>(),
            },
            machine: Machine { devices: &Device::Cpu.into(), kind: Kind::Float },
        };
        let mut finished = Workspace::open(&out.path().join(batch_bytes.to_string()), &Default::default(), false).unwrap();
        sdxl_squeeze::compress::compress(&job, Gatherer::default(), &mut finished, &Silent).unwrap();
        let layers: Vec<LayerReport> = finished.reports().map(|(report, _)| report.clone()).collect();
        layers.into_iter().map(|report| (report.clone(), finished.weight(&report.name).unwrap().unwrap())).collect()
    };
    let one_by_one = run(0);
    assert!(one_by_one.len() > 50);
    for batch_bytes in [1, 1 << 20, 1 << 30] {
        let batches = run(batch_bytes);
        assert_eq!(batches.len(), one_by_one.len());
        for ((batch, weight), (one, expected)) in batches.iter().zip(&one_by_one) {
            assert_eq!((&batch.name, batch.errors), (&one.name, one.errors));
            assert_eq!(weight.decode().unwrap(), expected.decode().unwrap(), "{}", one.name);
        }
    }
}
