//! A run that cannot succeed is refused before it computes anything, and a run that is accepted
//! follows its config.

use std::path::Path;
use std::time::Instant;

use sdxl_squeeze::compress::Prepared;
use sdxl_squeeze::config::RunConfig;
use sdxl_squeeze::device::Placement;
use sdxl_squeeze::pipeline::PipelineFolder;
use sdxl_squeeze::recipe::RunOptions;
use serde_json::Value;
use tch::Kind;

use crate::squeeze::Squeeze;
use crate::support::{copy, emoji, ended_with, repo, squeeze, tiny};

/// Runs `compress` with progress in JSON. The run must end with the exit code `code`; its output is
/// returned.
fn compress(code: i32, model: &Path, out: &Path, more: &[&str]) -> String {
    let run = Squeeze::new("compress").args(["--progress", "json"]).model(model).out(out).args(more);
    let run = if more.contains(&"--config") { run } else { run.config("tutorial-s40-4bit-gs16") };
    run.ends_with(code).text()
}

#[test]
fn memory_and_disk_that_do_not_do_are_refused_before_anything_is_drawn() {
    let folder = tempfile::tempdir().unwrap();
    let (out, prompts) = (folder.path().join("out"), repo("calibration/emoji.txt"));
    let prompts = prompts.to_str().unwrap();
    let samples = folder.path().join("samples.safetensors");
    let few = ["--prompts", prompts, "--calibration-nsamples", "2", "--steps", "2", "--memory-budget", "100MiB"];
    for more in [&few[..], &[&few[..], &["--samples-out", samples.to_str().unwrap()]].concat()] {
        let said = compress(2, &emoji(), &out, more);
        assert!(said.contains("are too little for stage") && !said.contains("begin"), "{said}");
        assert!(!out.exists() && !samples.exists());
    }

    let many = folder.path().join("many.txt");
    std::fs::write(&many, (0..100_000).map(|number| format!("picture {number}\n")).collect::<String>()).unwrap();
    let much = ["--prompts", many.to_str().unwrap(), "--calibration-nsamples", "100000000", "--steps", "1000"];
    let memory = compress(2, &emoji(), &out, &much);
    assert!(memory.contains("of memory are too little for") && memory.contains("of samples"), "{memory}");
    let much = [&much[..], &["--memory-budget", "1024TiB"]].concat();
    let said = compress(2, &emoji(), &out, &much);
    assert!(said.contains("free, which is too little for") && said.contains("of samples"), "{said}");
    assert!(!said.contains("begin") && !out.exists(), "{said}");
}

#[test]
fn the_plan_says_what_a_run_takes_on_the_disk() {
    let folder = tempfile::tempdir().unwrap();
    let config = repo("configs/tutorial-s40-4bit-gs16.yaml");
    let plan = Squeeze::new("plan").arg(&config).model(tiny()).samples(4, 2);
    plan.succeeds().says(&["on the disk: ", " of carries, "]);
    let planned: Value = plan.arg("--json").succeeds().json();
    let disk = planned[0]["plan"]["disk"].clone();

    let samples = folder.path().join("samples.safetensors");
    let out = folder.path().join("out");
    Squeeze::new("compress")
        .arg("--config")
        .arg(&config)
        .model(tiny())
        .out(&out)
        .samples(4, 2)
        .arg("--samples-out")
        .arg(&samples)
        .succeeds();
    let report: Value = serde_json::from_str(&std::fs::read_to_string(out.join("report.json")).unwrap()).unwrap();
    let ratio = |planned: &Value, is: u64| planned.as_f64().unwrap() / is as f64;
    let size = |path: &Path| std::fs::metadata(path).unwrap().len();
    for (name, ratio) in [
        ("samples", ratio(&disk["samples"], size(&samples))),
        ("result", ratio(&disk["result"], size(&out.join("unet.squeezed.safetensors")))),
    ] {
        // Plans do not count the header of the container, which is a large part of the file for a
        // model this small.
        assert!((0.6..1.2).contains(&ratio), "{name}: {ratio}, {disk}");
    }
    assert_eq!(report["plan"]["disk"]["samples"], 0, "the run was given its samples");
}

#[test]
fn all_entries_of_a_comparison_are_checked_before_anything_is_drawn() {
    let folder = tempfile::tempdir().unwrap();
    let here = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let write = |name: &str, text: &str| {
        std::fs::create_dir_all(Path::new(&here(name)).parent().unwrap()).unwrap();
        std::fs::write(here(name), text).unwrap();
        here(name)
    };
    let (emoji, other) = (emoji(), tiny());
    let (emoji, other) = (emoji.to_str().unwrap(), other.to_str().unwrap());
    let judge = write("judge.txt", "a dog\n");
    let out = here("out");
    let palettize = "solver: sequential\npalettize: {on_misfit: dense}\n";
    let good = write("good.yaml", &format!("model: {{path: {emoji}}}\n{palettize}"));
    let compare = |configs: &[&str], more: &[&str], parts: &[&str]| {
        let args = [&["compare", "--progress", "json", "--judge", &judge, "--out", &out], configs, more].concat();
        let said = ended_with(2, &squeeze(&args));
        parts.iter().for_each(|part| assert!(said.contains(part), "no `{part}` in: {said}"));
        assert!(!said.contains("\"begin\"") && !Path::new(&out).exists(), "{said}");
    };
    let models = write("models.yaml", &format!("model: {{path: {other}}}\n{palettize}"));
    compare(&[&good, &models], &[], &["good.yaml", "models.yaml", "the model"]);
    let dtype = write("dtype.yaml", &format!("model: {{path: {emoji}, dtype: bf16}}\n{palettize}"));
    compare(&[&good, &dtype], &[], &["dtype.yaml", "the dtype f32", "bf16"]);
    let device = write("device.yaml", &format!("model: {{path: {emoji}, device: 'cpu,cpu'}}\n{palettize}"));
    compare(&[&good, &device], &[], &["device.yaml", "the device cpu"]);
    let twin = write("twin/good.yaml", palettize);
    compare(&[&good, &twin], &["--model", emoji], &["good"]);
    // Only the layers of the model show that this config is wrong.
    let misfit =
        write("misfit.yaml", "palettize: {on_misfit: error, global_config: {granularity: per_grouped_channel, group_size: 7}}\n");
    let prompts = repo("calibration/emoji.txt");
    let begin = Instant::now();
    compare(&[&good, &misfit], &["--model", emoji, "--prompts", prompts.to_str().unwrap()], &["7"]);
    assert!(begin.elapsed().as_secs() < 20, "{:?}", begin.elapsed());
    let joint = repo("configs/tutorial-s40-4bit-gs16.yaml");
    let little = ["--model", emoji, "--prompts", prompts.to_str().unwrap(), "--memory-budget", "100MiB"];
    compare(&[&good, joint.to_str().unwrap()], &little, &["are too little"]);
}

#[test]
fn progress_reaches_its_total_on_several_devices() {
    let folder = tempfile::tempdir().unwrap();
    // Eighteen samples make two batches on a CPU.
    let prompts = folder.path().join("prompts.txt");
    std::fs::write(&prompts, (0..18).map(|number| format!("{number} apples\n")).collect::<String>()).unwrap();
    let few = ["--prompts", prompts.to_str().unwrap(), "--calibration-nsamples", "18", "--steps", "2", "--device", "cpu,cpu"];
    let said = compress(0, tiny(), &folder.path().join("out"), &few);
    let events: Vec<Value> = said.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    let of = |event: &str, task: &str| -> Vec<&Value> {
        events.iter().filter(|line| line["event"] == event && line["task"] == task).collect()
    };
    for task in ["Hessians", "outputs", "first carries"] {
        let ends = of("end", task);
        assert!(!ends.is_empty(), "{task}: {said}");
        for end in ends {
            assert_eq!(end["done"], end["total"], "{task}: {end}");
        }
    }
    let samples = of("sample", "Hessians");
    for device in [0, 1] {
        assert!(samples.iter().any(|line| line["device"] == device), "no sample of device {device}");
    }
    assert!(samples.iter().any(|line| line["done"] == line["total"] && line["total"].as_u64() > Some(1)));
}

/// Layers that depend only on time are calibrated with all timesteps that the model was trained on.
#[test]
fn as_many_timesteps_as_the_scheduler_says() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model");
    copy(&emoji(), &model);
    let path = model.join("scheduler/scheduler_config.json");
    let mut scheduler: Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    scheduler["num_train_timesteps"] = 1500.into();
    std::fs::write(&path, scheduler.to_string()).unwrap();
    let config = folder.path().join("time.yaml");
    let rules = "module_name_configs: {'time_embedding\\.linear_1': {n_bits: 4, granularity: per_tensor}}";
    std::fs::write(&config, format!("palettize: {{weight_threshold: 0, {rules}}}\n")).unwrap();
    let (prompts, out) = (repo("calibration/emoji.txt"), folder.path().join("out"));
    let few = ["--prompts", prompts.to_str().unwrap(), "--calibration-nsamples", "2", "--steps", "2"];
    compress(0, &model, &out, &[&["--config", config.to_str().unwrap()], &few[..]].concat());
    let report: Value = serde_json::from_str(&std::fs::read_to_string(out.join("report.json")).unwrap()).unwrap();
    assert_eq!(report["layers"][0]["name"], "time_embedding.linear_1");
    assert_eq!(report["layers"][0]["vectors"], 1500);
}

/// The library refuses to prepare a run whose options contradict its config.
#[test]
fn a_run_obeys_its_config() {
    let folder = PipelineFolder::open(&emoji()).unwrap();
    let config = RunConfig::read(&repo("configs/dense-4bit.yaml")).unwrap();
    let out = tempfile::tempdir().unwrap();
    let path = out.path().join("x.safetensors");
    let prepare = |config: &RunConfig, options: &RunOptions| Prepared::new(&folder, config, false, options, &path).map(drop);
    prepare(&config, &RunOptions::of(&config).unwrap()).unwrap();
    let refused = |config: &RunConfig, options: &RunOptions, part: &str| {
        let why = prepare(config, options).unwrap_err();
        assert!(why.is_bad_input() && why.to_string().contains(part), "{why}");
    };
    let half = Placement { kind: Kind::Half, ..Placement::CPU };
    refused(&config, &RunOptions::on(half), "`model.dtype` is f32");
    let mut two = config.clone();
    two.model.device = "cpu,cpu".into();
    refused(&two, &RunOptions::of(&config).unwrap(), "`model.device` is cpu,cpu");
    assert_eq!(RunOptions::of(&two).unwrap().devices.len(), 2);
    let mut other = config.clone();
    other.model.path = Some(tiny().to_owned());
    refused(&other, &RunOptions::of(&other).unwrap(), "`model.path` is");
    other.model.path = Some(emoji().join("unet/.."));
    prepare(&other, &RunOptions::of(&other).unwrap()).unwrap();
}
