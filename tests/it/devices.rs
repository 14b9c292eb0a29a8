//! Runs on several devices.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use sdxl_squeeze::calibration::{Samples, calibrate};
use sdxl_squeeze::compress::{self, Calibration, Gatherer, Job, LayerReport, Machine, Model, Workspace};
use sdxl_squeeze::config::RunConfig;
use sdxl_squeeze::container::CompressedWeight;
use sdxl_squeeze::device::{Placement, cuda_devices};
use sdxl_squeeze::pipeline::PipelineFolder;
use sdxl_squeeze::plan::{CarriesIn, Memory, Plan};
use sdxl_squeeze::progress::{Event, Progress, Silent};
use sdxl_squeeze::recipe::{Devices, Recipe, RunOptions};
use sdxl_squeeze::{Error, Result};
use serde_json::Value;
use tch::{Device, Kind};

use crate::gpu::has_gpu;
use crate::squeeze::Squeeze;
use crate::support::{container, interrupted_among_the_layers, repo, report, tiny};

/// Compresses the tiny model by the config `yaml` with samples of a picture for each of 20 prompts.
fn compress(folder: &Path, name: &str, yaml: &str, samples: usize) -> Squeeze {
    let (config, prompts) = (folder.join("config.yaml"), folder.join("prompts.txt"));
    std::fs::write(&config, yaml).unwrap();
    let lines: Vec<String> = (0..20).map(|number| format!("{number} apples")).collect();
    std::fs::write(&prompts, lines.join("\n")).unwrap();
    let run = Squeeze::new("compress").model(tiny()).out(folder.join(name)).config_file(config);
    run.with("--prompts", prompts).with("--calibration-nsamples", samples.to_string()).with("--steps", "2")
}

/// The container in `out`: its metadata without the names of the devices, and its bytes after the
/// header. (The header names the tensors' places, which would show in the bytes.)
pub(crate) fn content(out: &Path) -> (Value, Vec<u8>) {
    let mut bytes = container(out);
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let data = bytes.split_off(8 + length);
    let mut header: Value = serde_json::from_slice(&bytes[8..]).unwrap();
    let metadata = header["__metadata__"].as_object_mut().unwrap();
    let mut recipe: Value = serde_json::from_str(metadata["recipe"].as_str().unwrap()).unwrap();
    recipe["model"].as_object_mut().unwrap().remove("device").unwrap();
    metadata.insert("recipe".to_owned(), recipe);
    // A hash of all metadata, so of the names of the devices too.
    metadata.remove("metadata_sha256").unwrap();
    (header, data)
}

/// Asserts that each list of `devices` writes the bytes of the first one, with Hessians that are
/// made of `batches` batches.
#[track_caller]
fn same_bytes_on(devices: &[&str], yaml: &str, samples: usize, batches: u64) {
    let folder = tempfile::tempdir().unwrap();
    let results = devices.iter().enumerate().map(|(number, devices)| {
        let name = number.to_string();
        let run = compress(folder.path(), &name, yaml, samples).with("--device", devices).with("--progress", "json");
        let said = run.succeeds().stderr;
        let events: Vec<Value> = said.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
        let gathers = |line: &&Value| line["event"] == "begin" && line["task"] == "Hessians" && line["unit"] == "batches";
        let totals: Vec<u64> = events.iter().filter(gathers).map(|line| line["total"].as_u64().unwrap()).collect();
        assert!(!totals.is_empty() && totals.iter().all(|total| *total == batches), "{totals:?} of {batches} batches");
        // Each device has its batches, as far as there are any.
        let device = |line: &Value| (line["event"] == "sample").then(|| line["device"].as_u64().unwrap());
        let used: BTreeSet<u64> = events.iter().filter_map(device).collect();
        let all = devices.split(',').count() as u64;
        assert_eq!(used, (0..all.min(batches)).collect(), "{devices}");
        (content(&folder.path().join(&name)), report(&folder.path().join(&name)))
    });
    let results: Vec<_> = results.collect();
    let ((header, data), one) = &results[0];
    assert_eq!(one["samples"], samples);
    for (((other_header, other_data), other), devices) in results.iter().zip(devices).skip(1) {
        assert!(data == other_data, "{devices}: other bytes");
        assert_eq!(header, other_header, "{devices}");
        assert_eq!(one["layers"], other["layers"], "{devices}");
    }
}

const ONE_TO_THREE: [&str; 3] = ["cpu", "cpu,cpu", "cpu,cpu,cpu"];

fn config(name: &str) -> String {
    std::fs::read_to_string(repo(&format!("configs/{name}.yaml"))).unwrap()
}

/// Forty calls make three batches of up to 16 on a CPU.
#[test]
fn several_devices_give_the_bytes_of_one_by_the_tutorials_recipe() {
    same_bytes_on(&ONE_TO_THREE, &config("tutorial-s40-4bit-gs16"), 40, 3);
}

const JOINT: &str = "
solver: joint
sequencing: sublayer
target: TARGET
calibration: {timestep_weighting: early}
prune: {global_config: {target_sparsity: 0.5}}
palettize: {global_config: {granularity: per_grouped_channel, group_size: 16, n_bits: 4}, on_misfit: dense}
";

/// Calls of different weights are batches of their own; one of the eleven is held out.
#[test]
fn several_devices_give_the_bytes_of_one_by_the_joint_solver() {
    same_bytes_on(&ONE_TO_THREE, &JOINT.replace("TARGET", "dense"), 11, 11);
}

#[test]
fn more_devices_than_batches_give_the_bytes_of_one() {
    let yaml = JOINT.replace("joint", "sequential").replace("TARGET", "current");
    same_bytes_on(&ONE_TO_THREE, &yaml, 2, 2);
    same_bytes_on(&ONE_TO_THREE, &yaml.replace("early", "uniform"), 2, 1);
}

/// One GPU that is named twice, and two if there are two.
#[test]
fn several_gpus_give_the_bytes_of_one() {
    if !has_gpu("several_gpus_give_the_bytes_of_one") {
        return;
    }
    let several = if cuda_devices().unwrap() > 1 { "cuda:0,cuda:1" } else { "cuda:0,cuda:0" };
    same_bytes_on(&["cuda:0", several], &JOINT.replace("TARGET", "dense"), 11, 11);
    // Forty calls make batches of three on a GPU.
    same_bytes_on(&["cuda:0", several], &config("tutorial-s40-4bit-gs16"), 40, 14);
}

const BUDGET: &str = "
calibration: {timestep_weighting: early, captions: CAPTIONS, captions_nsamples: 9}
prune: {layers: [mid_block], global_config: {target_sparsity: 0.5}}
palettize:
  on_misfit: dense
  module_name_configs:
    'mid_block.*': {granularity: per_grouped_channel, group_size: 16, n_bits: 4}
    '.*': null
budget: {target_bits: 5}
";

/// The error curves of a budget are of the same Hessians, and captions are added to the samples'.
#[test]
fn a_budget_on_several_devices_gives_the_bytes_of_one() {
    let captions = repo("calibration/emoji-captions.txt");
    same_bytes_on(&ONE_TO_THREE, &BUDGET.replace("CAPTIONS", captions.to_str().unwrap()), 5, 5);
}

#[test]
fn a_run_on_several_devices_is_killed_and_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let yaml = JOINT.replace("TARGET", "dense");
    let run = |name: &str| compress(folder.path(), name, &yaml, 3).with("--device", "cpu,cpu");
    run("whole").succeeds();
    interrupted_among_the_layers(run("stopped").with("--progress", "json").command());
    run("stopped").arg("--resume").succeeds();
    assert!(container(&folder.path().join("stopped")) == container(&folder.path().join("whole")));

    let mut child = run("killed").starts();
    let finished = |entry: std::io::Result<std::fs::DirEntry>| entry.unwrap().file_name().to_string_lossy().starts_with("part-");
    let work = folder.path().join("killed/unet.squeezed.work");
    while !std::fs::read_dir(&work).is_ok_and(|mut entries| entries.any(finished)) {
        assert!(child.try_wait().unwrap().is_none(), "the run ended before it was killed");
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    run("killed").arg("--resume").succeeds();
    assert!(container(&folder.path().join("killed")) == container(&folder.path().join("whole")));
}

/// The layers of the tiny model, compressed by the tutorial's recipe with `samples`, each of which
/// is a batch.
fn compress_samples(
    samples: &Samples,
    devices: usize,
    carries: CarriesIn,
    progress: &dyn Progress,
) -> Result<Vec<(LayerReport, CompressedWeight)>> {
    let folder = PipelineFolder::open(tiny()).unwrap();
    let weights = folder.unet_weights().unwrap();
    let config = RunConfig::read(&repo("configs/tutorial-s40-4bit-gs16.yaml")).unwrap();
    let recipe = Recipe::new(&config, &folder.unet).unwrap();
    let memory = Memory::new(8 << 30, Kind::Float, Device::Cpu);
    let mut plan = Plan::new(&folder.unet, &recipe.layers, recipe.sequencing, samples.shape(), memory, &|_| 4).unwrap();
    plan.carries = carries;
    let out = tempfile::tempdir().unwrap();
    let mut store = Workspace::open(&out.path().join("work"), &Default::default(), false).unwrap();
    let job = Job {
        model: Model { chain: &folder.unet, source: &weights.narrow_source(Placement::CPU) },
        layers: &recipe.layers,
        plan: &plan,
        calibration: Calibration {
            samples,
            weights: &vec![1.0; samples.calls.len()],
            timesteps: &(0..1000).map(f64::from).collect::<Vec<_>>(),
        },
        machine: Machine { devices: &Devices::new(vec![Device::Cpu; devices]).unwrap(), kind: Kind::Float },
    };
    compress::compress(&job, Gatherer::default(), &mut store, progress)?;
    let reports: Vec<LayerReport> = store.reports().map(|(report, _)| report.clone()).collect();
    let weight = |report: &LayerReport| store.weight(&report.name).map(|weight| weight.expect("a finished layer is stored"));
    reports.into_iter().map(|report| Ok((report.clone(), weight(&report)?))).collect()
}

fn five_samples() -> Samples {
    let folder = PipelineFolder::open(tiny()).unwrap();
    let weights = folder.unet_weights().unwrap();
    let mut config = RunConfig::read(&repo("configs/tutorial-s40-4bit-gs16.yaml")).unwrap();
    (config.calibration.calibration_nsamples, config.calibration.steps) = (5, Some(2));
    calibrate(&folder, &weights, &config.calibration, &RunOptions::on(Placement::CPU), &Silent).unwrap()
}

#[test]
fn carries_of_several_devices_wait_in_files() {
    let samples = five_samples();
    let layers = |devices, carries| compress_samples(&samples, devices, carries, &Silent).unwrap();
    let in_memory = layers(1, CarriesIn::Memory);
    for devices in [1, 2, 3] {
        let in_files = layers(devices, CarriesIn::Files);
        assert_eq!(in_files.len(), in_memory.len());
        for ((report, weight), (expected, expected_weight)) in in_files.iter().zip(&in_memory) {
            assert_eq!((&report.name, report.vectors, report.errors), (&expected.name, expected.vectors, expected.errors));
            assert!(weight == expected_weight, "{devices} devices: `{}` has other bytes", report.name);
        }
    }
}

#[test]
fn a_device_that_fails_ends_the_run_on_all() {
    for bad in 0..5 {
        let mut samples = five_samples();
        let sample = &mut samples.calls[bad].sample;
        *sample = sample.f_mul_scalar(f64::NAN).unwrap();
        let errors = [1, 2, 3, 7].map(|devices| compress_samples(&samples, devices, CarriesIn::Memory, &Silent).unwrap_err());
        assert!(matches!(errors[0], Error::Layer { .. }), "{}", errors[0]);
        let [one, others @ ..] = errors.map(|error| format!("{error:?}"));
        assert!(one.contains("NaN"), "{one}");
        assert!(others.iter().all(|other| *other == one), "{bad}: {one} {others:?}");
    }
}

/// Wants the work to stop after some samples have passed a part.
struct StopsAfter(AtomicUsize);

impl Progress for StopsAfter {
    fn report(&self, event: Event<'_>) {
        if let Event::Sample { .. } = event {
            let _ = self.0.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1));
        }
    }

    fn cancelled(&self) -> bool {
        self.0.load(Ordering::SeqCst) == 0
    }
}

#[test]
fn a_stop_ends_the_run_on_all_devices() {
    let samples = five_samples();
    for after in [1, 2, 3, 5, 6, 9, 14] {
        for devices in [2, 3, 7] {
            let stopped = compress_samples(&samples, devices, CarriesIn::Memory, &StopsAfter(AtomicUsize::new(after)));
            assert!(matches!(stopped, Err(Error::Stopped)), "{after} samples, {devices} devices: {stopped:?}");
        }
    }
}
