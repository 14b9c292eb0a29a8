//! The main job through the binary: compress, verify, inspect, export, draw from the container.

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

use crate::support::{emoji, ended_with, repo, squeeze, tensors, tiny};

/// A small run: the bundled model, few samples.
fn compress(config: &str, out: &Path, more: &[&str]) -> String {
    let (config, prompts, model) = (repo(config), repo("calibration/emoji.txt"), emoji());
    let mut args = vec![
        "compress",
        "--config",
        config.to_str().unwrap(),
        "--model",
        model.to_str().unwrap(),
        "--out",
        out.to_str().unwrap(),
    ];
    args.extend(["--prompts", prompts.to_str().unwrap(), "--calibration-nsamples", "6", "--steps", "4"]);
    args.extend(more);
    ended_with(0, &squeeze(&args))
}

fn report(out: &Path) -> Value {
    serde_json::from_str(&std::fs::read_to_string(out.join("report.json")).unwrap()).unwrap()
}

#[test]
fn pruned_and_palettized_end_to_end() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("s40");
    let said = compress("configs/tutorial-s40-4bit-gs16.yaml", &out, &[]);
    assert!(said.contains("few") || said.contains("fewer than its"), "{said}");
    let found = report(&out);
    assert_eq!(found["samples"], 6);
    let layers = found["layers"].as_array().unwrap();
    for layer in layers.iter().filter(|layer| layer["vectors"].is_u64()) {
        let sparsity = layer["sparsity"].as_f64().unwrap();
        assert!((0.4..0.4025).contains(&sparsity), "{}: {sparsity}", layer["name"]);
        let errors = &layer["errors"];
        // Where there are few values a group, palettes cost nothing; the two errors are summed
        // differently.
        assert!(errors["pruned_output"].as_f64().unwrap() <= 1.001 * errors["output"].as_f64().unwrap(), "{layer}");
    }

    // The container is whole, and says of itself what was written.
    let file = out.join("unet.squeezed.safetensors");
    let file = file.to_str().unwrap();
    let said = ended_with(0, &squeeze(&["verify", file]));
    assert!(said.contains("every hash holds"), "{said}");
    assert_eq!(found["bytes"].as_u64().unwrap(), std::fs::metadata(file).unwrap().len());
    let said = ended_with(0, &squeeze(&["inspect", file]));
    assert!(said.contains("down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"), "{said}");

    // The config as resolved is a config, and gives the same bytes again.
    let again = folder.path().join("again");
    let model = emoji();
    let args = [
        "compress",
        "--config",
        out.join("config.yaml").to_str().unwrap(),
        "--model",
        model.to_str().unwrap(),
        "--out",
        again.to_str().unwrap(),
    ]
    .map(str::to_owned);
    ended_with(0, &squeeze(&args.iter().map(String::as_str).collect::<Vec<_>>()));
    assert!(
        std::fs::read(again.join("unet.squeezed.safetensors")).unwrap() == std::fs::read(file).unwrap(),
        "another run, other bytes"
    );

    // A picture straight from the container is that of the exported folder.
    let exported = folder.path().join("exported");
    ended_with(
        0,
        &squeeze(&["export", file, "--to", "diffusers", "--model", model.to_str().unwrap(), "--out", exported.to_str().unwrap()]),
    );
    let draw = |name: &str, more: &[&str]| {
        let path = folder.path().join(name);
        let mut args = vec!["generate", "--prompt", "owl", "--steps", "4", "-o", path.to_str().unwrap()];
        args.extend(more);
        ended_with(0, &squeeze(&args));
        let decoder = png::Decoder::new(std::io::BufReader::new(std::fs::File::open(&path).unwrap()));
        let mut reader = decoder.read_info().unwrap();
        let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
        reader.next_frame(&mut pixels).unwrap();
        pixels
    };
    let straight = draw("a.png", &["--model", model.to_str().unwrap(), "--unet", file]);
    assert_eq!(straight, draw("b.png", &["--model", exported.to_str().unwrap()]));
    assert_ne!(straight, draw("c.png", &["--model", model.to_str().unwrap()]));
}

/// ‖X W - X W'‖² / ‖X W‖², the mean over the layers that were calibrated.
fn mean_error(found: &Value) -> f64 {
    let layers = found["layers"].as_array().unwrap().iter();
    let errors: Vec<f64> = layers.filter_map(|layer| layer["errors"]["output"].as_f64()).collect();
    errors.iter().sum::<f64>() / errors.len() as f64
}

#[test]
fn the_joint_solver_stores_the_same_bytes_and_loses_less() {
    let folder = tempfile::tempdir().unwrap();
    let run = |name: &str, config: &str, more: &[&str]| {
        let out = folder.path().join(name);
        let said = compress(config, &out, more);
        (report(&out), said)
    };
    let s40 = "configs/tutorial-s40-4bit-gs16.yaml";
    let (sequential, _) = run("sequential", s40, &[]);
    let (joint, _) = run("joint", s40, &["--solver", "joint", "--sequencing", "stage"]);
    let bytes = |found: &Value| found["payload_bytes"].as_f64().unwrap();
    assert!((bytes(&joint) - bytes(&sequential)).abs() < 8.0);
    let share = |found: &Value| found["sparsity"].as_f64().unwrap();
    // The same to a weight or two: blocks round as they come.
    assert!((share(&joint) - share(&sequential)).abs() < 1e-5);
    assert!(mean_error(&joint) < 0.8 * mean_error(&sequential), "{} and {}", mean_error(&joint), mean_error(&sequential));

    // Dense palettes are calibrated too, at the UNet's two ends as well.
    let (dense, _) = run("dense", "configs/dense-4bit-gs16.yaml", &["--solver", "joint"]);
    assert_eq!(dense["samples"], 6);
    for layer in dense["layers"].as_array().unwrap() {
        assert!(layer["vectors"].is_u64() && layer["errors"]["output"].is_f64(), "{layer}");
    }
    let (plain, _) = run("plain", "configs/dense-4bit-gs16.yaml", &[]);
    assert_eq!(dense["payload_bytes"], plain["payload_bytes"]);
}

#[test]
fn dense_palettes_need_no_calibration_and_keep_their_order() {
    let folder = tempfile::tempdir().unwrap();
    let mut errors = Vec::new();
    let mut sizes = Vec::new();
    for name in ["dense-8bit", "dense-6bit", "dense-4bit-gs4", "dense-4bit-gs16", "dense-4bit-gs32", "dense-4bit"] {
        let out = folder.path().join(name);
        compress(&format!("configs/{name}.yaml"), &out, &[]);
        let found = report(&out);
        assert_eq!(found["samples"], 0);
        // Squared weight errors, each layer by its size.
        let layers = found["layers"].as_array().unwrap();
        let error: f64 = layers.iter().map(|layer| layer["errors"]["weight"].as_f64().unwrap()).sum();
        errors.push(error);
        sizes.push(found["payload_bytes"].as_u64().unwrap());
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
    compress("configs/tutorial-2of4-4bit-gs16.yaml", &out, &[]);
    let file = out.join("unet.squeezed.safetensors");
    let exported = folder.path().join("exported");
    let model = emoji();
    ended_with(
        0,
        &squeeze(&[
            "export",
            file.to_str().unwrap(),
            "--to",
            "diffusers",
            "--model",
            model.to_str().unwrap(),
            "--out",
            exported.to_str().unwrap(),
        ]),
    );
    let written = tensors(&exported.join("unet/diffusion_pytorch_model.safetensors"));
    let container = Container::open(&file).unwrap();
    for layer in container.layers() {
        let ours = tch::Tensor::from_slice(&container.decode(&layer.name).unwrap()).view(layer.shape.as_slice());
        assert_eq!(ours, written[&layer.name], "{}", layer.name);
        if layer.sparsity > 0.1 {
            assert_eq!(layer.sparsity, 0.5, "{}: 2 of every 4", layer.name);
        }
    }
    // And the folder is a pipeline.
    let pipeline = PipelineFolder::open(&exported).unwrap();
    let weights = pipeline.unet_weights().unwrap();
    Unet::resident(pipeline.unet.clone(), weights.source(Placement::CPU), &Silent).unwrap();
}

#[test]
fn samples_can_be_kept_and_used_again() {
    let folder = tempfile::tempdir().unwrap();
    let samples = folder.path().join("samples.safetensors");
    let out = |name: &str| folder.path().join(name);
    compress("configs/tutorial-s50-4bit-gs16.yaml", &out("a"), &["--samples-out", samples.to_str().unwrap()]);
    let (config, model) = (repo("configs/tutorial-s50-4bit-gs16.yaml"), emoji());
    let b = out("b");
    let args = [
        "compress",
        "--config",
        config.to_str().unwrap(),
        "--model",
        model.to_str().unwrap(),
        "--out",
        b.to_str().unwrap(),
        "--samples",
        samples.to_str().unwrap(),
        "--calibration-nsamples",
        "6",
    ];
    ended_with(0, &squeeze(&args));
    let weight = |name: &str| {
        let container = Container::open(&out(name).join("unet.squeezed.safetensors")).unwrap();
        container.decode("mid_block.resnets.0.conv1.weight").unwrap()
    };
    assert_eq!(weight("a"), weight("b"));

    // Damaged samples are named.
    let bytes = std::fs::read(&samples).unwrap();
    std::fs::write(&samples, &bytes[..bytes.len() / 2]).unwrap();
    assert!(ended_with(2, &squeeze(&args)).contains("not a whole safetensors file"));
}

#[test]
fn what_cannot_be_done_is_said() {
    let folder = tempfile::tempdir().unwrap();
    let (config, model) = (repo("configs/tutorial-s40-4bit-gs16.yaml"), emoji());
    let out = folder.path().join("x");
    let run = |more: &[&str]| {
        let mut args = vec!["compress", "--config", config.to_str().unwrap(), "--out", out.to_str().unwrap()];
        args.extend(more);
        ended_with(2, &squeeze(&args))
    };
    let root = model.to_str().unwrap();
    assert!(run(&[]).contains("which model?"));
    assert!(run(&["--model", root, "--target-sparsity", "1.0"]).contains("--target-sparsity"));
    assert!(run(&["--model", root, "--n-bits", "5"]).contains("--n-bits"));
    assert!(run(&["--model", root, "--prompts", "/nowhere/prompts.txt"]).contains("/nowhere/prompts.txt"));
    assert!(run(&["--model", "/nowhere"]).contains("cannot read"));

    // Two mistakes, two lines, each with its place.
    let bad = folder.path().join("bad.yaml");
    std::fs::write(&bad, "palettize:\n  global_config:\n    n_bits: 5\n    granularty: per_tensor\n").unwrap();
    let said = ended_with(
        2,
        &squeeze(&["compress", "--config", bad.to_str().unwrap(), "--model", root, "--out", out.to_str().unwrap()]),
    );
    assert!(said.contains(":3:") && said.contains(":4:") && said.contains("granularity"), "{said}");
    assert_eq!(said.lines().count(), 2, "{said}");
}

#[test]
fn compare_judges_on_prompts_that_calibration_has_not_seen() {
    let folder = tempfile::tempdir().unwrap();
    let (judge, out) = (folder.path().join("judge.txt"), folder.path().join("out"));
    std::fs::write(&judge, "owl\nrocket\n").unwrap();
    let (eight, four) = (repo("configs/dense-8bit.yaml"), repo("configs/dense-4bit.yaml"));
    let (model, prompts) = (emoji(), repo("calibration/emoji.txt"));
    let run = |judge: &Path| {
        squeeze(&[
            "compare",
            eight.to_str().unwrap(),
            four.to_str().unwrap(),
            "--model",
            model.to_str().unwrap(),
            "--judge",
            judge.to_str().unwrap(),
            "--prompts",
            prompts.to_str().unwrap(),
            "--steps",
            "3",
            "--held-out",
            "4",
            "--out",
            out.to_str().unwrap(),
        ])
    };
    ended_with(0, &run(&judge));
    let found: Value = serde_json::from_str(&std::fs::read_to_string(out.join("report.json")).unwrap()).unwrap();
    let number = |row: usize, key: &str| found["rows"][row][key].as_f64().unwrap();
    assert!(number(0, "unet_error") < 0.1 * number(1, "unet_error"));
    assert!(found["rows"][0]["psnr"]["mean"].as_f64() > found["rows"][1]["psnr"]["mean"].as_f64());
    assert!(number(0, "bytes") > 1.8 * number(1, "bytes"));
    assert_eq!(found["rows"][0]["stages"].as_array().unwrap().len(), 7);
    assert!(std::fs::read_to_string(out.join("report.html")).unwrap().contains("dense-4bit"));
    assert!(out.join("sheet.png").is_file());
}

/// As on a GPU, here on the CPU: layers of one shape in batches of several sizes.
#[test]
fn layers_in_batches_are_those_one_by_one() {
    let folder = PipelineFolder::open(tiny()).unwrap();
    let weights = folder.unet_weights().unwrap();
    let mut config = RunConfig::read(&repo("configs/tutorial-s40-4bit-gs16.yaml")).unwrap();
    (config.calibration.calibration_nsamples, config.calibration.steps) = (4, 2);
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
            calibration: Calibration { samples: &samples, weights: &[], timesteps: 1000 },
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
