//! The further samplers against diffusers' (tests/golden/make_samplers.py), with the noise of
//! torch's generator, and what their configs may not ask for.

use std::path::Path;

use sdxl_squeeze::Error;
use sdxl_squeeze::calibration::Samples;
use sdxl_squeeze::device::Placement;
use sdxl_squeeze::model::scheduler::{SchedulerChoice, SchedulerConfig, SpacingKind};
use sdxl_squeeze::picture::Picture;
use sdxl_squeeze::pipeline::{
    GenerateRequest, Guidance, ImageRequest, Mask, PipelineFolder, PromptEncoder, PromptOptions, generate,
};
use sdxl_squeeze::progress::Silent;
use sdxl_squeeze::random::Generator;
use sdxl_squeeze::synth::{Preset, synthesize};
use serde::Deserialize;
use serde_json::{Value, json};
use tch::{Kind, Tensor};

use crate::schedulers::{config, error, predict, read, refusal};
use crate::squeeze::Squeeze;
use crate::support::{copy, emoji, relative_error, repo, squeeze, tensors};

#[derive(Deserialize)]
struct Case {
    name: String,
    config: Value,
    #[serde(rename = "override")]
    name_of_other: Option<String>,
    eta: Option<f64>,
    steps: Vec<usize>,
}

/// The final sample, drawn from the seed of the golden file, and the timesteps.
fn run(config: &SchedulerConfig, steps: usize, kind: Kind) -> (Tensor, Vec<f64>, f64) {
    let mut scheduler = config.scheduler(steps).unwrap();
    let mut generator = Generator::new(7);
    let mut sample = generator.draw(&[1, 4, 3, 5], kind).unwrap() * scheduler.init_noise_sigma();
    let timesteps = scheduler.timesteps().to_vec();
    for (index, timestep) in timesteps.iter().enumerate() {
        let scaled = scheduler.scale_model_input(&sample, index).unwrap();
        sample = scheduler.step(index, &predict(&scaled, *timestep), &sample, &mut generator).unwrap().to_kind(kind);
    }
    (sample.view(-1), timesteps, scheduler.init_noise_sigma())
}

/// How far a sample may be off. In one case the first picture is what is left of two numbers that
/// are 20,000 times as large, which makes much of their last bits.
///
/// The golden values are those of an x86-64. Elsewhere libtorch's normal numbers, which most of
/// these samplers add in each step, have other last bits. Where sigmas have other last bits too,
/// values of a Brownian path between them differ by the square root of that: the path is rough.
fn bound(name: &str) -> f64 {
    const ELSEWHERE: bool = !cfg!(target_arch = "x86_64");
    match name {
        "unipc/karras-cosine" if ELSEWHERE => 1e-3,
        "unipc/karras-cosine" => 1e-4,
        _ if is_cut(name) => 2e-2,
        _ if ELSEWHERE && name.contains("dpmpp-sde") => 5e-3,
        _ if ELSEWHERE => 2e-4,
        _ => 5e-6,
    }
}

/// Whether timesteps are truncated to whole numbers, which may be others where the square roots of
/// the processor are rounded differently (see `bounds_elsewhere` of the first samplers).
fn is_cut(name: &str) -> bool {
    let of_class = name.starts_with("dpmpp-2m/") || name.starts_with("unipc/");
    of_class && ["/beta", "/lu-cosine"].iter().any(|case| name.contains(case))
}

/// How far a timestep may be off.
fn timestep_bound(name: &str) -> f64 {
    if is_cut(name) { 1.0 } else { 1.3e-4 }
}

#[test]
fn every_further_sampler_equals_that_of_diffusers() {
    equal_those_of("samplers");
}

/// Beta sigmas, Lu's lambdas, the third order, DPM-Solver on the noise, dynamic thresholding.
#[test]
fn settings_that_few_models_have_equal_those_of_diffusers() {
    equal_those_of("samplers-further");
}

/// Runs the cases of a golden file.
fn equal_those_of(file: &str) {
    let golden = tensors(&repo(&format!("tests/golden/{file}.safetensors")));
    let list = std::fs::read_to_string(repo(&format!("tests/golden/{file}.json"))).unwrap();
    let cases: Vec<Case> = serde_json::from_str(&list).unwrap();
    let mut failures = Vec::new();
    for Case { name, config, name_of_other, eta, steps } in &cases {
        let read = read(&config.to_string()).unwrap();
        let read = name_of_other.as_ref().map_or_else(|| read.clone(), |other| read.with_override(other).unwrap());
        let read = eta.map_or_else(|| read.clone(), |eta| read.with_eta(eta).unwrap());
        let theirs = |part: &str| &golden[&format!("{name}.{part}")];
        let lengths: Vec<i64> = Vec::try_from(theirs("lengths")).unwrap();
        let all: Vec<f64> = Vec::try_from(theirs("timesteps")).unwrap();
        let mut remaining = all.as_slice();
        for (index, (&steps, length)) in steps.iter().zip(lengths).enumerate() {
            let (expected, rest) = remaining.split_at(length as usize);
            remaining = rest;
            let (sample, timesteps, init) = run(&read, steps, Kind::Float);
            assert_eq!(timesteps.len(), expected.len(), "{name} in {steps} steps");
            let apart = timesteps.iter().zip(expected).map(|(ours, theirs)| (ours - theirs).abs()).fold(0.0, f64::max);
            let expected_init = theirs("init").double_value(&[index as i64]);
            let apart_init = (init - expected_init).abs() / expected_init;
            let apart_sample = error(&sample, &theirs("float32").get(index as i64));
            if apart > timestep_bound(name) || apart_init > 2.5e-7 || apart_sample.is_nan() || apart_sample > bound(name) {
                failures.push(format!(
                    "{name} in {steps} steps: timesteps differ by {apart:.1e}, the first factor by {apart_init:.1e}, the sample \
                     by {apart_sample:.1e}"
                ));
            }
        }
        let apart = error(&run(&read, 4, Kind::Half).0, theirs("float16"));
        if apart.is_nan() || apart > 2.5e-2 {
            failures.push(format!("{name} in fp16: the sample differs by {apart:.1e}"));
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[derive(Deserialize)]
struct Settings {
    scheduler: String,
    timestep_spacing: Option<SpacingKind>,
    steps: usize,
    guidance: f64,
    negative_prompt: Option<String>,
    guidance_rescale: Option<f64>,
    eta: Option<f64>,
}

#[derive(Deserialize)]
struct Pipelines {
    prompt: String,
    seed: u64,
    cases: std::collections::BTreeMap<String, Settings>,
}

/// Negative prompt, guidance, its rescaling, eta and the noise of the steps, as a pipeline combines
/// them.
#[test]
fn whole_pipelines_equal_those_of_diffusers() {
    let golden = tensors(&repo("tests/golden/samplers-pipelines.safetensors"));
    let text = std::fs::read_to_string(repo("tests/golden/samplers-pipelines.json")).unwrap();
    let Pipelines { prompt, seed, cases } = serde_json::from_str(&text).unwrap();
    let folder = PipelineFolder::open(&repo("tests/golden/base-like")).unwrap();
    let mut failures = Vec::new();
    for (name, case) in cases {
        let request = GenerateRequest {
            prompt: prompt.clone(),
            negative_prompt: case.negative_prompt,
            seed,
            steps: case.steps,
            guidance: case.guidance,
            guidance_rescale: case.guidance_rescale.unwrap_or(0.0),
            size: Some((64, 64)),
            original_size: None,
            target_size: None,
            scheduler: Some(case.scheduler),
            timestep_spacing: case.timestep_spacing,
            eta: case.eta.unwrap_or(0.0),
            low_memory: false,
            unet: None,
            unverified: false,
            prompts: PromptOptions::default(),
            image: None,
        };
        let latents = generate(&folder, &request, Placement::CPU, &Silent).unwrap().latents;
        let apart = relative_error(&latents, &golden[&name]);
        if apart.is_nan() || apart > 2e-5 {
            failures.push(format!("{name}: the latents differ by {apart:.1e}"));
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

/// Image to image, and inpainting with a UNet that is told of the mask and with one that is not.
#[test]
fn every_sampler_starts_from_a_picture_as_in_diffusers() {
    let golden = tensors(&repo("tests/golden/samplers-pictures.safetensors"));
    let text = std::fs::read_to_string(repo("tests/golden/samplers-pipelines.json")).unwrap();
    let Pipelines { prompt, seed, .. } = serde_json::from_str(&text).unwrap();
    let here = tempfile::tempdir().unwrap();
    let base = PipelineFolder::open(&repo("tests/golden/base-like")).unwrap();
    let told = PipelineFolder::open(&crate::architectures::pipeline("inpainting-like", here.path())).unwrap();
    let pictures = repo("tests/golden/architectures");
    let mut failures = Vec::new();
    for (name, expected) in &golden {
        let (scheduler, case) = name.split_once('/').unwrap();
        let (what, strength) = case.split_once('@').unwrap();
        let folder = if what == "inpainting" { &told } else { &base };
        let mask = (what != "image").then(|| Mask::read_png(&pictures.join("mask.png")).unwrap());
        let picture = Picture::read_png(&pictures.join("image.png")).unwrap();
        let request = GenerateRequest {
            prompt: prompt.clone(),
            negative_prompt: None,
            seed,
            steps: 5,
            guidance: 4.0,
            guidance_rescale: 0.0,
            size: None,
            original_size: None,
            target_size: None,
            scheduler: Some(scheduler.into()),
            timestep_spacing: None,
            eta: 0.0,
            low_memory: false,
            unet: None,
            unverified: false,
            prompts: PromptOptions::default(),
            image: Some(ImageRequest { picture, mask, strength: strength.parse().ok(), guidance: None }),
        };
        let drawn = generate(folder, &request, Placement::CPU, &Silent).unwrap_or_else(|error| panic!("{name}: {error}"));
        let apart = relative_error(&drawn.latents, expected);
        if apart.is_nan() || apart > 2e-5 {
            failures.push(format!("{name}: the latents differ by {apart:.1e}"));
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    // dpmpp-2m is in `image_to_image_equals_diffusers`.
    for name in SchedulerChoice::NAMES.iter().filter(|name| !name.ends_with("-karras") && **name != "dpmpp-2m") {
        assert!(["image", "mask"].iter().all(|what| golden.contains_key(&format!("{name}/{what}@0.6"))), "{name}");
    }
}

/// The lines of `plan` that say how samples are drawn.
fn drawn(model: &Path, flags: &[&str]) -> String {
    let config = repo("configs/squeeze-4bit-gs16.yaml");
    let plan = squeeze(&[&["plan", config.to_str().unwrap(), "--model", model.to_str().unwrap()], flags].concat());
    assert!(plan.status.success(), "{}", String::from_utf8_lossy(&plan.stderr));
    let text = String::from_utf8(plan.stdout).unwrap();
    text.lines().find(|line| line.contains("samples of")).unwrap().to_owned()
}

#[test]
fn distilled_models_are_calibrated_as_they_run() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("emoji-lightning-2step");
    copy(&emoji(), &model);
    let line = drawn(&model, &[]);
    assert!(line.contains("samples of 1 x") && line.contains("in 2 steps at guidance 0;"), "{line}");
    assert!(line.contains("the name `emoji-lightning-2step` is that of a Lightning model"), "{line}");
    // What the command line says comes first.
    let line = drawn(&model, &["--steps", "6", "--guidance", "3"]);
    assert!(
        line.contains("samples of 2 x") && line.ends_with("in memory") && line.contains("in 6 steps at guidance 3;"),
        "{line}"
    );
    let line = drawn(&model, &["--scheduler", "heun", "--timestep-spacing", "trailing", "--guidance-rescale", "0.5"]);
    assert!(line.contains("HeunDiscreteScheduler in 2 steps (3 calls of the UNet) at guidance 0 rescaled by 0.5"), "{line}");
    assert!(drawn(&emoji(), &[]).contains("EulerDiscreteScheduler in 20 steps at guidance 5;"));
    // A word alone changes nothing, and is said.
    let storm = folder.path().join("lightning_storm_xl");
    copy(&emoji(), &storm);
    let line = drawn(&storm, &[]);
    assert!(line.contains("EulerDiscreteScheduler in 20 steps at guidance 5; the name `lightning_storm_xl` suggests"), "{line}");
    assert!(line.contains("--steps 4 --guidance 0 --timestep-spacing trailing"), "{line}");
    assert!(!drawn(&storm, &["--steps", "20", "--guidance", "5"]).contains("suggests"));
}

#[test]
fn a_distilled_model_is_compressed_with_its_own_stochastic_sampler() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model");
    copy(&emoji(), &model);
    let path = model.join("scheduler/scheduler_config.json");
    let mut keys: Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    keys["_class_name"] = json!("EulerAncestralDiscreteScheduler");
    keys["timestep_spacing"] = json!("trailing");
    std::fs::write(&path, keys.to_string()).unwrap();
    let index = model.join("model_index.json");
    let text =
        std::fs::read_to_string(&index).unwrap().replace("\"EulerDiscreteScheduler\"", "\"EulerAncestralDiscreteScheduler\"");
    std::fs::write(&index, text).unwrap();
    let config = folder.path().join("config.yaml");
    let rules = "module_name_configs: {'mid_block\\..*to_q': {n_bits: 4, granularity: per_tensor}}";
    std::fs::write(&config, format!("calibration: {{prompts: [a cat]}}\npalettize: {{weight_threshold: 0, {rules}}}\n")).unwrap();
    let runs = ["once", "again"].map(|name| {
        let out = folder.path().join(name);
        let samples = folder.path().join(format!("{name}.safetensors"));
        let paths = [&config, &model, &out, &samples].map(|path| path.to_str().unwrap());
        let flags = ["--config", paths[0], "--model", paths[1], "--out", paths[2], "--samples-out", paths[3]];
        let run = squeeze(&[&["compress", "--quiet"][..], &flags, &["--calibration-nsamples", "4"]].concat());
        assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
        let resolved = std::fs::read_to_string(out.join("resolved.yaml")).unwrap();
        assert!(resolved.contains("steps: 4\n") && resolved.contains("guidance: 0.0\n"), "{resolved}");
        std::fs::read(samples).unwrap()
    });
    assert!(runs[0] == runs[1], "two runs drew other samples");
}

#[test]
fn calibration_reads_prompts_as_generate_does() {
    let here = tempfile::tempdir().unwrap();
    let model = repo("tests/golden/base-like");
    let long = "the cat and the dog sat on a red mat, ".repeat(12);
    let (config, samples) = (here.path().join("config.yaml"), here.path().join("samples.safetensors"));
    let rules = "module_name_configs: {'mid_block.*attn2.to_k': {n_bits: 4, granularity: per_tensor}}";
    let prompts = json!(["a cat", long]);
    let text = format!("calibration: {{prompts: {prompts}, steps: 2}}\npalettize: {{weight_threshold: 0, {rules}}}\n");
    std::fs::write(&config, text).unwrap();
    let run = || Squeeze::new("compress").config_file(&config).model(&model).args(["--calibration-nsamples", "4", "--overwrite"]);
    let mut containers = Vec::new();
    let cases: [(&str, PromptOptions, &[&str], &[&str]); 4] = [
        ("usual", PromptOptions::default(), &[], &[]),
        ("skip", PromptOptions { clip_skip: 1, long_prompts: false }, &["--clip-skip", "1"], &["clip_skip: 1\n"]),
        ("long", PromptOptions { clip_skip: 0, long_prompts: true }, &["--long-prompts"], &["long_prompts: true\n"]),
        (
            "both",
            PromptOptions { clip_skip: 1, long_prompts: true },
            &["--clip-skip=1", "--long-prompts=true"],
            &["clip_skip: 1\n", "long_prompts: true\n"],
        ),
    ];
    let folder = PipelineFolder::open(&model).unwrap();
    for (name, options, flags, keys) in cases {
        let out = here.path().join(name);
        run().args(flags).out(&out).with("--samples-out", &samples).succeeds();
        let recorded = std::fs::read_to_string(out.join("resolved.yaml")).unwrap();
        let written: Vec<&str> = recorded
            .split_inclusive('\n')
            .map(str::trim_start)
            .filter(|line| line.starts_with("clip_skip") || line.starts_with("long_p"))
            .collect();
        assert_eq!(written, keys, "{name}");
        let encoder = PromptEncoder::load(&folder, Placement::CPU).unwrap().with_options(options);
        // The short prompt is filled up with pieces of an empty text.
        let pieces = options.pieces(&folder, [&*long].into_iter()).unwrap();
        assert_eq!(pieces > 1, options.long_prompts);
        let encoder = encoder.with_pieces(pieces);
        let kept = Samples::read(&samples, folder.unet.config(), 4).unwrap();
        assert_eq!(kept.calls.len(), 4);
        for (number, call) in kept.calls.iter().enumerate() {
            let prompt = if number < 2 { "a cat" } else { &*long };
            let guidance = Guidance::encode(&encoder, &folder, prompt, None, 5.0, (64, 64)).unwrap();
            let states = guidance.conditioning.encoder_hidden_states;
            assert_eq!(states.size()[1], 77 * pieces as i64);
            assert!(relative_error(&call.conditioning.encoder_hidden_states, &states) < 1e-3, "{name}");
        }
        containers.push(std::fs::read(out.join("unet.squeezed.safetensors")).unwrap());
    }
    // The names of the runs are not in their containers, so that only the calibration differs.
    for (one, two) in [(0, 1), (0, 2), (1, 3), (2, 3)] {
        assert!(containers[one] != containers[two]);
    }
    run().args(["--long-prompts=false", "--clip-skip=0"]).out(here.path().join("again")).succeeds();
    assert!(std::fs::read(here.path().join("again/unet.squeezed.safetensors")).unwrap() == containers[0]);
    run().args(["--clip-skip", "9"]).out(here.path().join("no")).is_refused(&["clip_skip 9 leaves no layer of text_encoder"]);
    run().args(["--long-prompts=maybe"]).out(here.path().join("no")).is_refused(&["--long-prompts maybe"]);

    let line = |flags: &[&str]| Squeeze::new("plan").arg(&config).model(&model).args(flags).succeeds().text();
    assert!(line(&["--clip-skip", "1", "--long-prompts"]).contains("clip_skip 1, long prompts in pieces"));
    assert!(!line(&[]).contains("clip_skip"));

    let judge = here.path().join("judge.txt");
    std::fs::write(&judge, format!("an owl\n{long}and a bird\n")).unwrap();
    let compared = here.path().join("compared");
    let run = Squeeze::new("compare").arg(&config).model(&model).with("--judge", &judge).args(["--held-out", "2"]);
    run.args(["--clip-skip", "1", "--long-prompts", "--calibration-nsamples", "4"]).out(&compared).succeeds();
    let report = std::fs::read_to_string(compared.join("report.html")).unwrap();
    assert!(report.contains("clip_skip 1, long prompts in pieces"));
}

#[test]
fn keys_that_the_further_samplers_lack_are_refused_by_name() {
    let flow = json!({"use_flow_sigmas": true});
    let cases: [(&str, &str, Value); 31] = [
        ("EulerAncestralDiscreteScheduler", "prediction_type", json!({"prediction_type": "sample"})),
        ("LCMScheduler", "original_inference_steps", json!({"original_inference_steps": 0})),
        ("LCMScheduler", "original_inference_steps", json!({"original_inference_steps": 1001})),
        ("LCMScheduler", "dynamic_thresholding_ratio", json!({"thresholding": true, "dynamic_thresholding_ratio": -1})),
        ("LCMScheduler", "prediction_type", json!({"rescale_betas_zero_snr": true})),
        ("TCDScheduler", "original_inference_steps", json!({"original_inference_steps": 2000})),
        ("DDPMScheduler", "variance_type", json!({"variance_type": "learned_range"})),
        ("DDPMScheduler", "variance_type", json!({"variance_type": "fixed_large_log"})),
        ("DDPMScheduler", "sample_max_value", json!({"thresholding": true, "sample_max_value": 0.5})),
        ("DDPMScheduler", "beta_schedule", json!({"beta_schedule": "exp"})),
        ("HeunDiscreteScheduler", "beta_schedule", json!({"beta_schedule": "sigmoid"})),
        ("HeunDiscreteScheduler", "use_beta_sigmas", json!({"use_beta_sigmas": true, "use_karras_sigmas": true})),
        ("DPMSolverSDEScheduler", "prediction_type", json!({"prediction_type": "sample"})),
        ("DPMSolverSDEScheduler", "use_beta_sigmas", json!({"use_beta_sigmas": true, "use_exponential_sigmas": true})),
        ("DPMSolverSDEScheduler", "noise_sampler_seed", json!({"noise_sampler_seed": -1})),
        ("DPMSolverSDEScheduler", "noise_sampler_seed", json!({"noise_sampler_seed": [1, 2]})),
        ("PNDMScheduler", "skip_prk_steps", json!({})),
        ("PNDMScheduler", "skip_prk_steps", json!({"skip_prk_steps": false})),
        ("PNDMScheduler", "prediction_type", json!({"skip_prk_steps": true, "prediction_type": "sample"})),
        ("UniPCMultistepScheduler", "use_flow_sigmas", flow),
        ("UniPCMultistepScheduler", "solver_order", json!({"solver_order": 4})),
        ("UniPCMultistepScheduler", "solver_type", json!({"solver_type": "bh1"})),
        ("UniPCMultistepScheduler", "predict_x0", json!({"predict_x0": false})),
        ("UniPCMultistepScheduler", "lower_order_final", json!({"lower_order_final": false})),
        ("UniPCMultistepScheduler", "final_sigmas_type", json!({"final_sigmas_type": "sigma_min", "use_karras_sigmas": true})),
        ("UniPCMultistepScheduler", "solver_p", json!({"solver_p": "DDIMScheduler"})),
        ("EDMEulerScheduler", "sigma_min", json!({"sigma_min": 80.0})),
        ("EDMEulerScheduler", "prediction_type", json!({"prediction_type": "sample"})),
        ("EDMDPMSolverMultistepScheduler", "solver_order", json!({"solver_order": 4})),
        ("EDMDPMSolverMultistepScheduler", "algorithm_type", json!({"algorithm_type": "dpmsolver"})),
        (
            "EDMDPMSolverMultistepScheduler",
            "final_sigmas_type",
            json!({"final_sigmas_type": "sigma_min", "solver_type": "heun", "lower_order_final": false}),
        ),
    ];
    for (class, key, keys) in cases {
        let error = refusal(&config(class, keys.clone()), 20);
        assert!(error.to_string().contains(&format!("`{key}`")), "{class} {keys}: {error}");
        assert!(matches!(error, Error::ConfigKey { .. }), "{class} {keys}: {error:?}");
    }
    let runge_kutta = refusal(&config("PNDMScheduler", json!({})), 20).to_string();
    assert!(runge_kutta.contains("which `--scheduler plms` sets"), "{runge_kutta}");
}

#[test]
fn more_steps_than_a_model_was_distilled_at_are_refused() {
    for class in ["LCMScheduler", "TCDScheduler"] {
        let error = refusal(&config(class, json!({})), 51).to_string();
        assert!(error.contains("cannot take 51 steps") && error.contains("original_inference_steps"), "{error}");
    }
}

#[test]
fn what_a_class_does_not_have_is_refused_and_not_ignored() {
    for class in ["LCMScheduler", "TCDScheduler", "EDMEulerScheduler"] {
        let error = config(class, json!({})).with_spacing(SpacingKind::Trailing).unwrap_err().to_string();
        assert!(error.contains(class) && error.contains("timestep_spacing"), "{error}");
    }
    let euler = config("EulerDiscreteScheduler", json!({}));
    assert!(euler.with_eta(0.5).unwrap_err().to_string().contains("takes no eta"));
    assert!(config("TCDScheduler", json!({})).with_eta(1.5).unwrap_err().to_string().contains("between 0 and 1"));
    let trailing = euler.with_spacing(SpacingKind::Trailing).unwrap().scheduler(4).unwrap().timesteps().to_vec();
    assert_eq!(trailing, [999.0, 749.0, 499.0, 249.0]);
    let brownian = euler.with_override("DPMSolverSDEScheduler").unwrap();
    assert_eq!(brownian.class(), "DPMSolverSDEScheduler");
    assert_eq!(brownian, euler.with_override("dpmpp-sde").unwrap());
}

#[test]
fn timesteps_say_how_often_the_model_is_called() {
    let calls =
        |class: &str, steps: usize| config(class, json!({"skip_prk_steps": true})).scheduler(steps).unwrap().timesteps().len();
    assert_eq!([1, 2, 20].map(|steps| calls("HeunDiscreteScheduler", steps)), [1, 3, 39]);
    assert_eq!([1, 2, 20].map(|steps| calls("DPMSolverSDEScheduler", steps)), [1, 3, 39]);
    assert_eq!([1, 2, 20].map(|steps| calls("PNDMScheduler", steps)), [1, 3, 21]);
}

/// What Apple's Swift pipeline gives the UNet, read in its source: the encoded empty text as the
/// negative prompt, time ids of 1,024 whatever the size, two rows at every scale, PLMS.
#[test]
fn every_second_prompt_of_a_mix_is_fed_as_by_apples_pipeline() {
    let here = tempfile::tempdir().unwrap();
    let model = here.path().join("model");
    synthesize(Preset::Tiny, &model, 0, Kind::Half, &Silent).unwrap();
    let folder = PipelineFolder::open(&model).unwrap();
    let prompts = here.path().join("prompts.txt");
    std::fs::write(&prompts, "a cat\na dog\na fish\n").unwrap();
    let samples = here.path().join("samples.safetensors");
    let run = |out: &str| {
        let run = Squeeze::new("compress").config("tutorial-s50-4bit-gs16").model(&model).with("--prompts", &prompts);
        run.args(["--calibration-nsamples", "6", "--steps", "4"]).out(here.path().join(out))
    };
    run("mixed").args(["--mix", "diffusers", "--mix", "swift"]).with("--samples-out", &samples).succeeds();
    let recorded = std::fs::read_to_string(here.path().join("mixed/resolved.yaml")).unwrap();
    assert!(recorded.contains("mix:\n    - diffusers\n    - swift"), "{recorded}");
    let encoder = PromptEncoder::load(&folder, Placement::CPU).unwrap();
    let encoded = |text: &str| encoder.encode(&[text]).unwrap().states;
    let kept = Samples::read(&samples, folder.unet.config(), 6).unwrap();
    let by_diffusers = folder.scheduler.scheduler(4).unwrap().timesteps().to_vec();
    let by_apple = folder.scheduler.with_override("plms").unwrap().scheduler(4).unwrap().timesteps().to_vec();
    assert_eq!(kept.calls.len(), 6);
    for (index, call) in kept.calls.iter().enumerate() {
        let (states, ids) = (&call.conditioning.encoder_hidden_states, &call.conditioning.time_ids);
        // The prompts in turn, two calls of each.
        let (prompt, swift) = (["a cat", "a dog", "a fish"][index / 2], index / 2 == 1);
        assert!(relative_error(&states.narrow(0, 1, 1), &encoded(prompt)) < 1e-6, "{index}");
        let negative = if swift { encoded("") } else { states.narrow(0, 1, 1).zeros_like() };
        assert!(states.narrow(0, 0, 1).allclose(&negative, 1e-5, 1e-6, false), "{index}");
        let told = if swift { 1024.0 } else { folder.picture_size(None).unwrap().0 as f64 };
        assert_eq!(Vec::<f64>::try_from(ids.select(0, 0)).unwrap(), [told, told, 0.0, 0.0, told, told]);
        let timesteps = if swift { &by_apple } else { &by_diffusers };
        assert!(timesteps.contains(&call.timestep), "{index}: {}", call.timestep);
    }
    run("no").args(["--mix", "swift", "--mix", "swift"]).is_refused(&["names `swift` twice"]);
    run("no").args(["--mix", "siwft"]).is_refused(&["siwft"]);
    let alone = run("no").args(["--mix", "diffusers", "--mix", "swift", "--guidance", "1"]);
    alone.is_refused(&["calls of different shapes", "guidance scale above 1"]);
    // The default is not written, so that configs and containers are what they were.
    run("plain").succeeds();
    assert!(!std::fs::read_to_string(here.path().join("plain/resolved.yaml")).unwrap().contains("  mix:"));

    let judge = here.path().join("judge.txt");
    std::fs::write(&judge, "an owl\n").unwrap();
    let compare = Squeeze::new("compare").arg(repo("configs/dense-4bit.yaml")).model(&model).with("--judge", &judge);
    let compare = compare.args(["--steps", "2", "--feed", "swift", "--no-noise-floor"]).out(here.path().join("compared"));
    compare.succeeds();
    let report = std::fs::read_to_string(here.path().join("compared/report.json")).unwrap();
    assert!(report.contains("Apple's Swift pipeline") && report.contains("PNDMScheduler"));
}

/// A model whose index names a class that is not implemented can be looked at, exported and used
/// with another sampler; `plan` says what a run would refuse.
#[test]
fn a_class_of_the_index_that_is_not_implemented_stops_only_what_needs_it() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model");
    copy(crate::support::tiny(), &model);
    let index = model.join("model_index.json");
    let text = std::fs::read_to_string(&index).unwrap();
    std::fs::write(&index, text.replace("EulerDiscreteScheduler", "LMSDiscreteScheduler")).unwrap();
    Squeeze::new("inspect").arg(&model).succeeds();
    Squeeze::new("export").arg(&model).with("--to", "coreml").out(folder.path().join("unet.mlpackage")).succeeds();
    let draw = || {
        Squeeze::new("generate").model(&model).args(["--prompt", "a cat", "--steps", "1"]).with("-o", folder.path().join("x.png"))
    };
    draw().is_refused(&["LMSDiscreteScheduler"]);
    draw().with("--scheduler", "euler").succeeds();
    let config = repo("configs/emoji/tutorial-s50-4bit-gs16.yaml");
    Squeeze::new("plan").arg(&config).model(&model).is_refused(&["LMSDiscreteScheduler"]);
    Squeeze::new("plan").arg(&config).model(&model).with("--scheduler", "euler").succeeds();
}
