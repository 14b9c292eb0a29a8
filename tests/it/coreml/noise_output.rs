//! Programs that make noise of what a UNet predicts, as Apple's samplers need it.
//!
//! `tests/golden/check_swift.py` compares them with diffusers, and draws pictures with them.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};

use sdxl_squeeze::Result;
use sdxl_squeeze::coreml::{Io, Layout, NoiseOutput, Options, Predicted, verify, write};
use sdxl_squeeze::device::Placement;
use sdxl_squeeze::export::{AppleNoise, apple_mismatch, apple_noise, coreml_chunks};
use sdxl_squeeze::model::Unobserved;
use sdxl_squeeze::model::scheduler::SchedulerConfig;
use sdxl_squeeze::model::unet::{Conditioning, Unet};
use sdxl_squeeze::pipeline::{PipelineFolder, UnetWeights};
use sdxl_squeeze::progress::Silent;
use sdxl_squeeze::random::noise;
use serde_json::{Value, json};
use tch::{Kind, Tensor};

use super::chunks::{paths, predict};
use super::faults::{Fault, bound, error_chain, fault, missed};
use super::file::Package;
use super::interpreter::evaluate;
use super::write::known_operations;
use crate::schedulers::config;
use crate::squeeze::Squeeze;
use crate::support::{copy, relative_error, repo};

/// Stable Diffusion's noise schedule, which Apple's samplers have.
fn scheduler(keys: Value) -> SchedulerConfig {
    let mut all = json!({ "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012 });
    all.as_object_mut().unwrap().extend(keys.as_object().unwrap().clone());
    config("EulerDiscreteScheduler", all)
}

/// What the package of the small base's UNet does, with another sampler.
fn noise_with(scheduler: &SchedulerConfig) -> Result<AppleNoise> {
    let pipeline = PipelineFolder::open(&repo("tests/golden/base-like")).unwrap();
    let weights = pipeline.unet_weights().unwrap();
    let prediction_type = Some(scheduler.prediction());
    apple_noise(UnetWeights::Dense { weights: &weights, config: pipeline.unet_config(), prediction_type }, scheduler)
}

/// A copy of the small base with other keys in its sampler's config.
fn model(folder: &Path, name: &str, keys: Value) -> PathBuf {
    let model = folder.join(name);
    copy(&repo("tests/golden/base-like"), &model);
    let path = model.join("scheduler/scheduler_config.json");
    let mut entries: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    entries.as_object_mut().unwrap().extend(keys.as_object().unwrap().clone());
    std::fs::write(&path, entries.to_string()).unwrap();
    model
}

/// Writes the package of a model's UNet as Apple's samplers need it, or two packages if `out` is a
/// folder's name.
fn package(model: &Path, layout: Layout, out: &Path) -> (PipelineFolder, AppleNoise) {
    let pipeline = PipelineFolder::open(model).unwrap();
    let weights = pipeline.unet_weights().unwrap();
    let source = UnetWeights::Dense {
        weights: &weights,
        config: pipeline.unet_config(),
        prediction_type: Some(pipeline.scheduler.prediction()),
    };
    let made = apple_noise(source, &pipeline.scheduler).unwrap();
    let (noise, time_ids) = (made.output.clone(), pipeline.time_ids());
    let options = Options { layout, io: Io::Apple, noise, time_ids, ..Options::new(pipeline.unet.config()) };
    if out.extension().is_none() {
        coreml_chunks(source, &options, out, &Silent).unwrap();
        return (pipeline, made);
    }
    write(source, &options, out, &Silent).unwrap();
    let found = verify(out).unwrap();
    assert!(found.hashed && found.named);
    assert_eq!(found.outputs, ["noise_pred: fp32 [2, 4, 8, 8]"]);
    (pipeline, made)
}

/// The entries of a package's metadata.
fn entries(out: &Path) -> HashMap<String, String> {
    Package::read(out).model.description.unwrap().metadata.unwrap().user_defined.into_iter().collect()
}

/// Inputs of a package at a timestep of Apple's, and the conditioning in them.
fn inputs(timestep: f64) -> (BTreeMap<String, Tensor>, Conditioning) {
    let (text, pooled) = (noise(&[2, 77, 40], 4, Kind::Float).unwrap(), noise(&[2, 32], 5, Kind::Float).unwrap());
    let time_ids = Tensor::from_slice(&[1024f32, 1024.0, 0.0, 0.0, 1024.0, 1024.0]).repeat([2, 1]);
    let given = [
        ("sample", noise(&[2, 4, 8, 8], 3, Kind::Float).unwrap()),
        ("timestep", Tensor::from_slice(&[timestep as f32; 2])),
        ("encoder_hidden_states", text.transpose(1, 2).unsqueeze(2)),
        ("time_ids", time_ids.shallow_clone()),
        ("text_embeds", pooled.shallow_clone()),
    ];
    let conditioning = Conditioning { encoder_hidden_states: text, text_embeds: pooled, time_ids, timestep_cond: None };
    (given.into_iter().map(|(name, x)| (name.to_owned(), x)).collect(), conditioning)
}

/// What a package and the model's UNet make of the same noisy latents at a timestep of Apple's, the
/// UNet at its `own` timestep.
fn predictions(pipeline: &PipelineFolder, out: &Path, timestep: f64, own: f64) -> [Tensor; 3] {
    let (inputs, conditioning) = inputs(timestep);
    let sample = inputs["sample"].shallow_clone();
    let made = evaluate(&mut Package::read(out), &inputs).remove("noise_pred").unwrap();
    let weights = pipeline.unet_weights().unwrap();
    let unet = Unet::resident(pipeline.unet.clone(), weights.source(Placement::CPU), &Silent).unwrap();
    let predicted = unet.forward(&sample, own, &conditioning, &mut Unobserved).unwrap();
    [made, predicted, sample]
}

/// The noise in latents with the share `signal` of a picture, from a prediction.
fn expected(prediction: &str, signal: f64, predicted: &Tensor, sample: &Tensor) -> Tensor {
    let (signal, noise) = (signal.sqrt(), (1.0 - signal).sqrt());
    let [predicted, sample] = [predicted, sample].map(|tensor| tensor.to_kind(Kind::Double));
    match prediction {
        "epsilon" => predicted,
        "v_prediction" => predicted * signal + sample * noise,
        "sample" => (sample - predicted * signal) / noise,
        other => panic!("{other}"),
    }
}

#[test]
fn velocities_and_pictures_become_noise_in_the_program() {
    let folder = tempfile::tempdir().unwrap();
    for (prediction, predicted) in [("v_prediction", Predicted::Velocity), ("sample", Predicted::Picture)] {
        let model = model(folder.path(), prediction, json!({ "prediction_type": prediction }));
        for layout in [Layout::Linear, Layout::SplitEinsum] {
            let out = folder.path().join(format!("{prediction}-{layout}.mlpackage"));
            let (pipeline, made) = package(&model, layout, &out);
            assert!(made.warnings.is_empty());
            let NoiseOutput { predicted: found, signal, timesteps } = made.output.unwrap();
            assert_eq!((found, timesteps), (predicted, None));
            // Apple's first timestep, one amid, and both ends of the schedule.
            for timestep in [951, 500, 999, 0] {
                let [made, predicted, sample] = predictions(&pipeline, &out, timestep as f64, timestep as f64);
                let expected = expected(prediction, f64::from(signal[timestep]), &predicted, &sample);
                let error = relative_error(&made, &expected.to_kind(Kind::Float));
                assert!(error < 1e-4, "{prediction} {layout} {timestep}: {error}");
                // The prediction itself is not noise.
                assert!(timestep < 500 || relative_error(&predicted, &expected.to_kind(Kind::Float)) > 0.1);
            }
        }
    }
}

/// A model that was trained on another noise schedule is told the timestep with equal noise.
#[test]
fn other_noise_schedules_are_told_their_own_timesteps() {
    let folder = tempfile::tempdir().unwrap();
    let apples = noise_with(&scheduler(json!({ "prediction_type": "v_prediction" }))).unwrap().output.unwrap().signal;
    assert_eq!(apples.len(), 1000);
    for (name, keys, warning) in [
        ("zero-snr", json!({ "prediction_type": "v_prediction", "rescale_betas_zero_snr": true }), "apple-zero-snr: "),
        ("other-betas", json!({ "beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02 }), "apple-schedule: "),
        ("fewer", json!({ "num_train_timesteps": 500, "prediction_type": "sample" }), "apple-schedule: "),
    ] {
        let prediction = keys["prediction_type"].as_str().unwrap_or("epsilon").to_owned();
        let out = folder.path().join(format!("{name}.mlpackage"));
        let (pipeline, made) = package(&model(folder.path(), name, keys), Layout::Linear, &out);
        assert!(made.warnings.len() == 1 && made.warnings[0].starts_with(warning), "{:?}", made.warnings);
        let NoiseOutput { signal, timesteps, .. } = made.output.unwrap();
        assert_eq!(signal, apples);
        let timesteps = timesteps.unwrap();
        // The model's schedule has Apple's noise between the timesteps on both sides of each.
        let own = pipeline.scheduler.signal().unwrap();
        let inside = signal.iter().zip(&timesteps).filter(|(signal, _)| (own[own.len() - 1]..own[0]).contains(*signal));
        let mut seen = 0;
        for (signal, timestep) in inside {
            let (below, above) = (own[timestep.floor() as usize], own[timestep.ceil() as usize]);
            assert!((above..=below).contains(signal) || (signal - below).abs() < 1e-6, "{name}: {signal} at {timestep}");
            seen += 1;
        }
        assert!(seen > 500, "{name}: {seen}");
        assert!(timesteps.windows(2).all(|pair| pair[0] <= pair[1]));
        for timestep in [999, 741, 20] {
            let [made, predicted, sample] = predictions(&pipeline, &out, timestep as f64, f64::from(timesteps[timestep]));
            let expected = expected(&prediction, f64::from(signal[timestep]), &predicted, &sample).to_kind(Kind::Float);
            let error = relative_error(&made, &expected);
            assert!(error < 1e-4, "{name} {timestep}: {error}");
        }
    }
    // CosXL's timesteps are logarithms of σ.
    let continuous = scheduler(json!({ "prediction_type": "v_prediction", "timestep_type": "continuous" }));
    let timesteps = noise_with(&continuous).unwrap().output.unwrap().timesteps.unwrap();
    for (signal, timestep) in apples.iter().zip(timesteps) {
        let sigma = f64::from((1.0 - signal) / signal).sqrt();
        assert!((0.25 * sigma.ln() - f64::from(timestep)).abs() < 1e-4);
    }
}

/// Two packages make the noise that one makes. Each has the tables that its parts need, and the
/// second reads the latents and the timestep only if it makes noise of another prediction: Swift
/// feeds it the first's inputs and outputs.
#[test]
fn the_second_of_two_packages_makes_noise() {
    let folder = tempfile::tempdir().unwrap();
    let zero_snr = json!({ "prediction_type": "v_prediction", "rescale_betas_zero_snr": true });
    let linear = json!({ "beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02 });
    for (name, keys, layout, says) in [
        ("velocity", json!({ "prediction_type": "v_prediction" }), Layout::Linear, [false, true]),
        ("picture", json!({ "prediction_type": "sample" }), Layout::SplitEinsum, [false, true]),
        ("zero-snr", zero_snr, Layout::SplitEinsum, [true, true]),
        ("other-betas", linear, Layout::Linear, [true, false]),
        ("noise", json!({}), Layout::Linear, [false, false]),
    ] {
        let model = model(folder.path(), name, keys);
        let (whole, chunks) = (folder.path().join(format!("{name}.mlpackage")), folder.path().join(format!("{name}-chunks")));
        package(&model, layout, &whole);
        package(&model, layout, &chunks);
        let chunks = paths(&chunks);
        for (path, says) in chunks.iter().zip(says) {
            let found = verify(path).unwrap();
            assert!(found.hashed && found.named, "{name}");
            assert_eq!(entries(path).contains_key("sdxl-squeeze.output_type"), says, "{name}: {}", path.display());
        }
        let converts = says[1];
        let first = verify(&chunks[1]).unwrap().inputs.remove(0);
        assert_eq!(first.starts_with("sample: fp16 [2, 4, 8, 8]"), converts, "{name}: {first}");
        let (inputs, _) = inputs(741.0);
        let made = predict(&chunks, &inputs);
        assert!(made.equal(&evaluate(&mut Package::read(&whole), &inputs)["noise_pred"]), "{name}: chunks differ from the whole");
    }
}

#[test]
fn a_model_of_noise_on_apples_schedule_is_left_as_it_is() {
    let found = noise_with(&scheduler(json!({}))).unwrap();
    assert_eq!(found, AppleNoise { output: None, warnings: Vec::new() });
    // Betas as they were trained, rounded in another way.
    let signal = scheduler(json!({})).signal().unwrap();
    let mut before = 1.0;
    let betas: Vec<f32> = signal.iter().map(|signal| 1.0 - signal / std::mem::replace(&mut before, *signal)).collect();
    assert_eq!(noise_with(&scheduler(json!({ "trained_betas": betas }))).unwrap().output, None);
}

/// Models that no program can make right for Apple's samplers.
#[test]
fn edm_and_flow_models_stay_refused() {
    for (class, keys, words) in [
        ("EDMEulerScheduler", json!({}), "is sampled by EDMEulerScheduler"),
        ("FlowMatchEulerDiscreteScheduler", json!({}), "is sampled by FlowMatchEulerDiscreteScheduler"),
        ("DPMSolverMultistepScheduler", json!({ "prediction_type": "flow_prediction" }), "predicts `flow_prediction`, not noise"),
    ] {
        let scheduler = config(class, keys);
        let mismatch = apple_mismatch(&scheduler).unwrap();
        assert!(mismatch.starts_with("apple-scheduler: ") && mismatch.contains(words), "{mismatch}");
        assert_eq!(noise_with(&scheduler).unwrap_err().to_string(), mismatch);
    }
}

#[test]
fn tables_that_fit_no_schedule_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let pipeline = PipelineFolder::open(&repo("tests/golden/base-like")).unwrap();
    let weights = pipeline.unet_weights().unwrap();
    let source = UnetWeights::Dense { weights: &weights, config: pipeline.unet_config(), prediction_type: None };
    let good = NoiseOutput { predicted: Predicted::Velocity, signal: vec![0.9, 0.5], timesteps: None };
    let refused = |io, noise, words: &str| {
        let options = Options { io, noise: Some(noise), ..Options::new(pipeline.unet.config()) };
        let out = folder.path().join("x.mlpackage");
        let why = write(source, &options, &out, &Silent).unwrap_err().to_string();
        assert!(why.contains(words) && !out.exists(), "{why}");
    };
    refused(Io::Diffusers, good.clone(), "only with Apple's inputs");
    refused(Io::Apple, NoiseOutput { signal: Vec::new(), ..good.clone() }, "the number of a sampler's timesteps");
    refused(Io::Apple, NoiseOutput { signal: vec![0.9, 0.0], ..good.clone() }, "is not between 0 and 1");
    refused(Io::Apple, NoiseOutput { timesteps: Some(vec![1.0]), ..good.clone() }, "1 timesteps of the UNet for 2");
    refused(Io::Apple, NoiseOutput { timesteps: Some(vec![1.0, f32::NAN]), ..good }, "is not finite");
}

#[test]
fn operations_that_make_noise_are_serialized_as_by_coremltools() {
    let folder = tempfile::tempdir().unwrap();
    let read = |name: &str| -> BTreeMap<String, BTreeSet<String>> {
        serde_json::from_slice(&std::fs::read(repo(&format!("tests/golden/coreml/{name}.json"))).unwrap()).unwrap()
    };
    let mut golden = read("operations");
    for (kind, patterns) in read("operations-noise") {
        golden.entry(kind).or_default().extend(patterns);
    }
    let keys = json!({ "prediction_type": "v_prediction", "rescale_betas_zero_snr": true });
    for layout in [Layout::Linear, Layout::SplitEinsum] {
        let out = folder.path().join(format!("{layout}.mlpackage"));
        package(&model(folder.path(), &layout.to_string(), keys.clone()), layout, &out);
        assert!(known_operations(&mut Package::read(&out), &golden).contains("gather"));
    }
}

/// Faults in a package that makes noise, each of which must be found and named.
fn faults() -> Vec<Fault> {
    let output_type = |package: &mut Package| {
        let metadata = package.model.description.as_mut().unwrap().metadata.as_mut().unwrap();
        metadata.user_defined.remove("sdxl-squeeze.output_type").unwrap()
    };
    vec![
        // Without the entry, tables are weights that no UNet has.
        fault("is not of this UNet", move |package| drop(output_type(package))),
        fault("`predicted_factors` is used more than once", |package| {
            *bound(package.named("noise_latents_factors"), "x") = "predicted_factors".into();
        }),
        fault("where ids are needed", |package| *bound(package.named("timestep_own"), "indices") = "timestep".into()),
        fault("the description's outputs", |package| package.block().outputs = vec!["prediction".into()]),
    ]
}

#[test]
fn faults_in_programs_that_make_noise_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let keys = json!({ "prediction_type": "v_prediction", "rescale_betas_zero_snr": true });
    let good = folder.path().join("good.mlpackage");
    package(&model(folder.path(), "model", keys), Layout::Linear, &good);
    for (at, (expected, put)) in faults().into_iter().enumerate() {
        let bad = folder.path().join(format!("{at}.mlpackage"));
        copy(&good, &bad);
        let mut package = Package::read(&good);
        put(&mut package);
        package.write(&bad);
        let why = error_chain(&verify(&bad).unwrap_err());
        assert!(why.contains(expected), "{at}: {why}, not {expected}");
    }
    // In two packages: each has exactly the tables and the inputs that its metadata tells of.
    let (velocity, betas) = (json!({ "prediction_type": "v_prediction" }), json!({ "beta_end": 0.02 }));
    let says = |package: &mut Package| {
        let metadata = package.model.description.as_mut().unwrap().metadata.as_mut().unwrap();
        metadata.user_defined.insert("sdxl-squeeze.output_type".into(), "epsilon".into());
    };
    let silent = |package: &mut Package| {
        let metadata = package.model.description.as_mut().unwrap().metadata.as_mut().unwrap();
        metadata.user_defined.remove("sdxl-squeeze.output_type").unwrap();
    };
    let cases: [(Value, [Vec<Fault>; 2]); 2] = [
        (
            velocity,
            [
                vec![fault("it has no tables for that", says)],
                vec![
                    fault("the inputs do not begin with those that this chunk reads", silent),
                    fault("`predicted_factors` is used more than once", |package| {
                        *bound(package.named("noise_latents_factors"), "x") = "predicted_factors".into();
                    }),
                ],
            ],
        ),
        (
            betas,
            [
                vec![fault("the weight `own_timesteps` is not of this UNet", silent)],
                vec![fault("the inputs do not begin with those that this chunk reads", says)],
            ],
        ),
    ];
    for (at, (keys, faults)) in cases.iter().enumerate() {
        let out = folder.path().join(format!("chunks-{at}"));
        package(&model(folder.path(), &format!("model-{at}"), keys.clone()), Layout::Linear, &out);
        for (path, faults) in paths(&out).iter().zip(faults) {
            let found = missed(&Package::read(path), faults, path);
            assert!(found.is_empty(), "{found:?}");
        }
    }
    // A package that makes no noise, and says that it does.
    let plain = folder.path().join("plain.mlpackage");
    package(&model(folder.path(), "plain", json!({})), Layout::Linear, &plain);
    let mut package = Package::read(&plain);
    let metadata = package.model.description.as_mut().unwrap().metadata.as_mut().unwrap();
    metadata.user_defined.insert("sdxl-squeeze.output_type".into(), "epsilon".into());
    package.write(&plain);
    let why = error_chain(&verify(&plain).unwrap_err());
    assert!(why.contains("it has no tables for that"), "{why}");
}

/// What the commands say, and what they write into the package.
#[test]
fn export_and_bundle_make_noise() {
    let folder = tempfile::tempdir().unwrap();
    let model = model(folder.path(), "v", json!({ "prediction_type": "v_prediction", "rescale_betas_zero_snr": true }));
    let out = folder.path().join("x.mlpackage");
    let export = |source: &Path, io: &str, out: &Path| {
        Squeeze::new("export").arg(source).with("--to", "coreml").with("--io", io).out(out).succeeds()
    };
    export(&model, "apple", &out).says(&["makes noise of what the UNet predicts (`v_prediction`)", "apple-zero-snr: "]);
    let found = entries(&out);
    assert_eq!((&*found["sdxl-squeeze.prediction_type"], &*found["sdxl-squeeze.output_type"]), ("v_prediction", "epsilon"));
    let plain = folder.path().join("y.mlpackage");
    export(&model, "diffusers", &plain);
    assert!(!entries(&plain).contains_key("sdxl-squeeze.output_type"));
    // A container of this UNet, and a model with a sampler for noise.
    let compressed = folder.path().join("compressed");
    Squeeze::new("compress").config("dense-4bit").model(&model).out(&compressed).succeeds();
    let container = compressed.join("unet.squeezed.safetensors");
    let noise = repo("tests/golden/base-like");
    let words = ["predicts `v_prediction`, and the sampler of the model is for one that predicts `epsilon`"];
    Squeeze::new("bundle").model(&noise).with("--unet", &container).out(folder.path().join("none")).is_refused(&words);
    let run = Squeeze::new("export").arg(&container).with("--to", "coreml").with("--io", "apple").model(&noise);
    run.out(folder.path().join("none.mlpackage")).is_refused(&words);
    // The second of two packages is told the latents.
    let halves = folder.path().join("halves");
    Squeeze::new("bundle").model(&model).with("--chunks", "2").out(&halves).succeeds().says(&["apple-zero-snr: "]);
    let inputs = verify(&paths(&halves)[1]).unwrap().inputs;
    assert!(inputs[0].starts_with("sample: fp16 ") && inputs[1] == "timestep: fp16 [2]", "{inputs:?}");
    let resources = folder.path().join("Resources");
    Squeeze::new("bundle").model(&model).out(&resources).succeeds().says(&["apple-zero-snr: "]);
    assert_eq!(entries(&resources.join("Unet.mlpackage"))["sdxl-squeeze.output_type"], "epsilon");
    let card = std::fs::read_to_string(resources.join("README.md")).unwrap();
    assert!(
        card.contains("predicts `v_prediction`, of which the package makes noise") && card.contains("apple-zero-snr"),
        "{card}"
    );
}
