//! Samplers, compared with those of diffusers (tests/golden/make_schedulers.py), and configs that
//! they must refuse.

use proptest::prelude::*;
use sdxl_squeeze::model::scheduler::{Scheduler, SchedulerChoice, SchedulerConfig, SchedulerKind};
use sdxl_squeeze::random::{Generator, noise};
use sdxl_squeeze::{Error, Result};
use serde::Deserialize;
use serde_json::{Value, json};
use tch::{Kind, Tensor};

use crate::support::{repo, tensors};

/// Reads `text` as a config file.
pub(crate) fn read(text: &str) -> Result<SchedulerConfig> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("scheduler_config.json");
    std::fs::write(&path, text).unwrap();
    SchedulerConfig::read(&path)
}

/// A config of the class `class` with further keys.
pub(crate) fn config(class: &str, keys: Value) -> SchedulerConfig {
    let mut keys = keys;
    keys["_class_name"] = json!(class);
    read(&keys.to_string()).unwrap()
}

const EULER: &str = "EulerDiscreteScheduler";
const DDIM: &str = "DDIMScheduler";
const DPM: &str = "DPMSolverMultistepScheduler";

/// The error of a config from which no sampler can be made.
pub(crate) fn refusal(config: &SchedulerConfig, steps: usize) -> Error {
    config.scheduler(steps).err().unwrap_or_else(|| panic!("{config:?} makes a sampler of {steps} steps"))
}

/// A function that takes the place of a UNet, computed in fp64.
pub(crate) fn predict(x: &Tensor, timestep: f64) -> Tensor {
    let wide = x.to_kind(Kind::Double);
    ((&wide * 3.0 + timestep / 100.0).sin() * 0.5 + &wide * 0.3).to_kind(x.kind())
}

/// Runs all steps and returns the sample after each step.
fn run(scheduler: &mut dyn Scheduler, noise: &Tensor) -> Vec<Tensor> {
    let mut sample = noise * scheduler.init_noise_sigma();
    let mut trace = Vec::new();
    for (index, timestep) in scheduler.timesteps().to_vec().into_iter().enumerate() {
        let scaled = scheduler.scale_model_input(&sample, index).unwrap();
        sample = scheduler.step(index, &predict(&scaled, timestep), &sample, &mut Generator::new(0)).unwrap();
        assert_eq!(sample.kind(), noise.kind());
        trace.push(sample.view(-1));
    }
    trace
}

/// The largest difference, relative to the largest value of `theirs`.
pub(crate) fn error(ours: &Tensor, theirs: &Tensor) -> f64 {
    assert_eq!(ours.size(), theirs.size());
    let (ours, theirs) = (ours.to_kind(Kind::Double), theirs.to_kind(Kind::Double));
    (ours - &theirs).abs().max().double_value(&[]) / theirs.abs().max().double_value(&[])
}

#[derive(Deserialize)]
struct Case {
    name: String,
    config: Value,
    #[serde(rename = "override")]
    name_of_other: Option<String>,
    steps: Vec<usize>,
}

/// Bounds of the differences between results and golden values.
struct Bounds {
    timesteps: f64,
    init: f64,
    float32: f64,
    float64: f64,
    float16: f64,
    bfloat16: f64,
}

/// The bounds for the libtorch and the kind of processor that made the golden file.
const ALIKE: Bounds = Bounds { timesteps: 0.0, init: 0.0, float32: 1e-6, float64: 1e-6, float16: 0.0, bfloat16: 0.0 };

/// The bounds for other processors, on which square roots may be rounded differently. Timesteps
/// that are computed from sigmas then differ in the last digit, and where DPM-Solver does not round
/// timesteps, it truncates them to other whole numbers. In 16 bits, one rounding error grows over
/// twenty steps. Without a signal in the first step (`zero-snr`), Euler's first sigma is the
/// reciprocal of the rounding error of a product of a thousand numbers.
fn bounds_elsewhere(name: &str) -> Bounds {
    let curved = name.contains("karras") || name.contains("exponential");
    let cut = name.starts_with("dpmpp-2m") && (name.contains("exponential") || name.contains("karras-cosine"));
    let samples = match (cut, name.starts_with("euler") && name.contains("zero-snr")) {
        (true, _) => 2e-2,
        (_, true) => 1e-3,
        _ => 1e-5,
    };
    let timesteps = if cut { 1.0 } else { 1.3e-4 };
    Bounds {
        timesteps: match (curved, name.contains("continuous")) {
            (true, _) => timesteps,
            // These timesteps are 0.25 log(sigma).
            (_, true) => 1e-6,
            _ => 0.0,
        },
        init: 2.5e-7,
        float32: samples,
        float64: samples,
        float16: 2.5e-2,
        bfloat16: 6e-2,
    }
}

#[test]
fn every_sampler_equals_that_of_diffusers() {
    let golden = tensors(&repo("tests/golden/schedulers.safetensors"));
    let cases: Vec<Case> = serde_json::from_str(&std::fs::read_to_string(repo("tests/golden/schedulers.json")).unwrap()).unwrap();
    let noise = &golden["noise"];
    let mut failures = Vec::new();
    let mut check = |what: &'static str, name: &str, error: f64, bound: f64| {
        if error.is_nan() || error > bound {
            failures.push(format!("{name}: {what} differ by {error:.1e}, which is above {bound:.1e}"));
        }
    };
    let alike = Tensor::linspace(0.01, 200.0, 1000, (Kind::Float, tch::Device::Cpu)).sqrt() == golden["roots"];
    for Case { name, config, name_of_other, steps } in &cases {
        let bound = if alike { ALIKE } else { bounds_elsewhere(name) };
        let read = read(&config.to_string()).unwrap();
        let read = name_of_other.as_ref().map_or_else(|| read.clone(), |other| read.with_override(other).unwrap());
        let theirs = |part: &str| golden.get(&format!("{name}.{part}"));
        let lengths: Vec<i64> = Vec::try_from(theirs("lengths").unwrap()).unwrap();
        let all: Vec<f64> = Vec::try_from(theirs("timesteps").unwrap()).unwrap();
        let mut remaining = all.as_slice();
        for (index, (&steps, length)) in steps.iter().zip(lengths).enumerate() {
            let name = format!("{name} in {steps} steps");
            let mut scheduler = read.scheduler(steps).unwrap();
            let (timesteps, rest) = remaining.split_at(length as usize);
            remaining = rest;
            assert_eq!(scheduler.timesteps().len(), timesteps.len(), "{name}");
            let differences = scheduler.timesteps().iter().zip(timesteps).map(|(ours, theirs)| (ours - theirs).abs());
            let difference = differences.fold(0.0, f64::max);
            check("timesteps", &name, difference, bound.timesteps);
            let init = theirs("init").unwrap().double_value(&[index as i64]);
            check("init_noise_sigma", &name, (scheduler.init_noise_sigma() - init).abs() / init, bound.init);
            let expected = theirs("float32").unwrap().get(index as i64);
            for round in ["float32", "float32 (second picture)"] {
                let result = run(scheduler.as_mut(), noise).pop().unwrap();
                check(round, &name, error(&result, &expected), bound.float32);
            }
        }
        for (what, kind, bound) in [
            ("float64", Kind::Double, bound.float64),
            ("float16", Kind::Half, bound.float16),
            ("bfloat16", Kind::BFloat16, bound.bfloat16),
        ] {
            let result = run(read.scheduler(20).unwrap().as_mut(), &noise.to_kind(kind)).pop().unwrap();
            check(what, name, error(&result, theirs(what).unwrap()), bound);
        }
        if let Some(expected) = theirs("trace") {
            let result = Tensor::stack(&run(read.scheduler(5).unwrap().as_mut(), noise), 0);
            check("every step's sample", name, error(&result, expected), bound.float32);
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

/// Every spacing with every curve, solver and prediction, at 1 to 25 steps
/// (tests/golden/make_sampler_grid.py).
#[test]
fn a_grid_of_settings_equals_diffusers() {
    #[derive(Deserialize)]
    struct Setting {
        class: String,
        keys: Value,
        steps: Vec<usize>,
        #[serde(rename = "final")]
        finals: Vec<Vec<f64>>,
    }
    let text = std::fs::read_to_string(repo("tests/golden/sampler-grid.json")).unwrap();
    let golden: Value = serde_json::from_str(&text).unwrap();
    let settings: Vec<Setting> = serde_json::from_value(golden["settings"].clone()).unwrap();
    assert!(settings.len() > 128);
    let noise: Vec<f64> = serde_json::from_value(golden["noise"].clone()).unwrap();
    let noise = Tensor::from_slice(&noise).to_kind(Kind::Float).view([1, 1, 2, 2]);
    let roots = &tensors(&repo("tests/golden/schedulers.safetensors"))["roots"];
    let alike = Tensor::linspace(0.01, 200.0, 1000, (Kind::Float, tch::Device::Cpu)).sqrt() == *roots;
    let mut failures = Vec::new();
    for Setting { class, keys, steps, finals } in settings {
        let mut entries = golden["sdxl"].clone();
        entries.as_object_mut().unwrap().extend(keys.as_object().unwrap().clone());
        let read = config(&class, entries);
        for (steps, expected) in steps.into_iter().zip(finals) {
            assert!((1..=25).contains(&steps));
            let result = run(read.scheduler(steps).unwrap().as_mut(), &noise).pop().unwrap();
            let off = error(&result, &Tensor::from_slice(&expected));
            // On other processors, timesteps of a curve may be cut to other whole numbers.
            if off > if alike { 1e-6 } else { 2e-2 } {
                failures.push(format!("{class} {keys} in {steps} steps: {off:.1e}"));
            }
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[test]
fn a_model_that_always_predicts_one_picture_ends_there() {
    let picture = noise(&[1, 4, 3, 5], 1, Kind::Float).unwrap();
    for class in [EULER, DDIM, DPM] {
        for keys in [json!({}), json!({"use_karras_sigmas": true}), json!({"solver_type": "heun"})] {
            for steps in [1, 2, 3, 14, 15, 40] {
                let mut keys = keys.clone();
                keys["prediction_type"] = json!("sample");
                keys["clip_sample"] = json!(false);
                let mut scheduler = config(class, keys).scheduler(steps).unwrap();
                let mut sample = noise(&picture.size(), 9, Kind::Float).unwrap() * scheduler.init_noise_sigma();
                for index in 0..scheduler.timesteps().len() {
                    sample = scheduler.step(index, &picture, &sample, &mut Generator::new(0)).unwrap();
                }
                assert!(error(&sample, &picture) < 1e-6, "{class} in {steps} steps");
            }
        }
    }
}

#[test]
fn keys_that_are_not_implemented_are_refused_by_name() {
    let shared = [
        ("beta_schedule", json!({"beta_schedule": "sigmoid"})),
        ("beta_start", json!({"beta_start": -0.1})),
        ("beta_end", json!({"beta_end": "much"})),
        ("trained_betas", json!({"trained_betas": [0.1, 0.2]})),
        ("trained_betas", json!({"trained_betas": [0.1, -0.2], "num_train_timesteps": 2})),
        ("num_train_timesteps", json!({"num_train_timesteps": 1})),
        ("num_train_timesteps", json!({"num_train_timesteps": 1e12})),
        ("timestep_spacing", json!({"timestep_spacing": "random"})),
        ("steps_offset", json!({"steps_offset": -1})),
        ("prediction_type", json!({"prediction_type": "flow_prediction"})),
    ];
    let sigmas = [
        ("use_beta_sigmas", json!({"use_beta_sigmas": true, "use_karras_sigmas": true})),
        ("use_beta_sigmas", json!({"use_beta_sigmas": "yes"})),
        ("use_karras_sigmas", json!({"use_karras_sigmas": true, "use_exponential_sigmas": true})),
        ("sigma_min", json!({"sigma_min": 0})),
        ("sigma_max", json!({"sigma_max": -3.5})),
        ("final_sigmas_type", json!({"final_sigmas_type": "small"})),
        ("beta_schedule", json!({"beta_start": 0.5, "beta_end": 0.9})),
    ];
    let euler =
        [("interpolation_type", json!({"interpolation_type": "cubic"})), ("timestep_type", json!({"timestep_type": "random"}))];
    let ddim = [
        ("dynamic_thresholding_ratio", json!({"thresholding": true, "dynamic_thresholding_ratio": 2})),
        ("sample_max_value", json!({"thresholding": true, "sample_max_value": 0.5})),
        ("clip_sample_range", json!({"clip_sample_range": 0})),
        ("clip_sample", json!({"clip_sample": "yes"})),
        ("set_alpha_to_one", json!({"set_alpha_to_one": 1})),
        ("prediction_type", json!({"rescale_betas_zero_snr": true, "timestep_spacing": "trailing", "clip_sample": false})),
    ];
    let dpm = [
        ("thresholding", json!({"thresholding": 1})),
        ("sample_max_value", json!({"thresholding": true, "sample_max_value": 0.0})),
        ("use_lu_lambdas", json!({"use_lu_lambdas": "yes"})),
        ("use_flow_sigmas", json!({"use_flow_sigmas": true})),
        ("solver_order", json!({"solver_order": 4})),
        ("solver_order", json!({"solver_order": 3, "algorithm_type": "sde-dpmsolver", "final_sigmas_type": "sigma_min"})),
        ("solver_type", json!({"solver_type": "bh3"})),
        ("algorithm_type", json!({"algorithm_type": "euler"})),
        ("final_sigmas_type", json!({"algorithm_type": "dpmsolver"})),
        ("final_sigmas_type", json!({"algorithm_type": "sde-dpmsolver"})),
        ("algorithm_type", json!({"algorithm_type": "deis", "final_sigmas_type": "zero"})),
        ("variance_type", json!({"variance_type": "learned_range"})),
        ("lambda_min_clipped", json!({"lambda_min_clipped": 100})),
        ("lambda_min_clipped", json!({"lambda_min_clipped": "low"})),
        ("lower_order_final", json!({"lower_order_final": 15})),
    ];
    let lists: [(&str, &[(&str, Value)]); 8] = [
        (EULER, &shared),
        (DDIM, &shared),
        (DPM, &shared),
        (EULER, &sigmas),
        (DPM, &sigmas),
        (EULER, &euler),
        (DDIM, &ddim),
        (DPM, &dpm),
    ];
    for (class, list) in lists {
        for (key, keys) in list {
            let error = refusal(&config(class, keys.clone()), 20);
            assert!(error.to_string().contains(&format!("`{key}`")), "{class} {keys}: {error}");
            assert!(matches!(error, Error::ConfigKey { .. }), "{class} {keys}: {error:?}");
        }
    }
}

#[test]
fn keys_of_other_classes_and_nulls_change_nothing() {
    let same = |class: &str, plain: Value, more: Value| {
        let sample = noise(&[1, 4, 3, 5], 2, Kind::Float).unwrap();
        let result = |keys: Value| run(config(class, keys).scheduler(5).unwrap().as_mut(), &sample).pop().unwrap();
        assert_eq!(result(plain), result(more.clone()), "{class} {more}");
    };
    same(EULER, json!({}), json!({"thresholding": true, "solver_order": 3, "use_lu_lambdas": true, "clip_sample": true}));
    same(DDIM, json!({}), json!({"use_karras_sigmas": true, "use_beta_sigmas": true, "algorithm_type": "sde-dpmsolver"}));
    same(DPM, json!({}), json!({"interpolation_type": "cubic", "clip_sample": true, "unheard_of": 3, "flow_shift": 3.0}));
    for class in [EULER, DDIM, DPM] {
        same(
            class,
            json!({}),
            json!({"timestep_spacing": null, "trained_betas": null, "sigma_min": null, "variance_type": null}),
        );
        same(
            class,
            json!({}),
            json!({"steps_offset": 3, "timestep_spacing": "leading", "_use_default_values": ["timestep_spacing", "steps_offset"]}),
        );
    }
}

#[test]
fn numbers_of_steps_that_cannot_be_are_refused() {
    for class in [EULER, DDIM, DPM] {
        for steps in [0, 1001, usize::MAX] {
            let error = refusal(&config(class, json!({})), steps);
            assert!(matches!(error, Error::Argument(_)) && error.to_string().contains(&steps.to_string()), "{error}");
        }
    }
    // With these configs diffusers reads beyond its tables, reads them from the wrong end, or
    // divides zero by zero.
    let offset = json!({"timestep_spacing": "leading", "steps_offset": 1});
    assert!(refusal(&config(DDIM, offset.clone()), 1000).to_string().contains("timestep 1000"));
    assert!(refusal(&config(DDIM, json!({"timestep_spacing": "trailing"})), 61).to_string().contains("timestep -1"));
    assert!(refusal(&config(DPM, offset), 1000).to_string().contains("take fewer"));
}

#[test]
fn steps_are_taken_in_order() {
    let sample = noise(&[1, 4, 3, 5], 3, Kind::Float).unwrap();
    for class in [EULER, DDIM, DPM] {
        let mut scheduler = config(class, json!({})).scheduler(3).unwrap();
        assert!(scheduler.step(3, &sample, &sample, &mut Generator::new(0)).is_err());
        assert!(scheduler.scale_model_input(&sample, 3).is_err());
    }
    let mut scheduler = config(DPM, json!({})).scheduler(3).unwrap();
    assert!(scheduler.step(1, &sample, &sample, &mut Generator::new(0)).is_err());
    assert!(scheduler.step(0, &sample, &sample, &mut Generator::new(0)).is_ok());
    assert!(scheduler.step(2, &sample, &sample, &mut Generator::new(0)).unwrap_err().to_string().contains("the next is 1"));
}

#[test]
fn samplers_are_picked_by_name() {
    let picked = |name: &str| name.parse::<SchedulerChoice>().unwrap();
    assert_eq!(picked("euler"), SchedulerChoice { kind: SchedulerKind::Euler, karras: false, variant: false });
    assert_eq!(
        picked("DPMPP-2M-Karras"),
        SchedulerChoice { kind: SchedulerKind::DpmSolverMultistep, karras: true, variant: false }
    );
    assert_eq!(picked("DDIMScheduler"), SchedulerChoice { kind: SchedulerKind::Ddim, karras: false, variant: false });
    for name in SchedulerChoice::NAMES {
        let config = config(EULER, json!({}));
        assert_eq!(config.with_override(name).unwrap().class(), picked(name).kind.class());
        assert_eq!(config.class(), EULER);
    }
    for (name, nearest) in
        [("eular", "euler"), ("dpmpp-2m-keras", "dpmpp-2m-karras"), ("ddim-karras", "ddim"), ("EulerDiscreteSchedular", EULER)]
    {
        let message = name.parse::<SchedulerChoice>().unwrap_err().to_string();
        assert!(message.contains(&format!("`{name}`")) && message.contains(&format!("`{nearest}`")), "{message}");
        assert!(SchedulerChoice::NAMES.iter().all(|known| message.contains(known)), "{message}");
    }
}

#[test]
fn a_class_that_is_not_implemented_can_be_replaced() {
    let config = config("LMSDiscreteScheduler", json!({"skip_prk_steps": true}));
    assert_eq!(config.class(), "LMSDiscreteScheduler");
    let error = refusal(&config, 20).to_string();
    assert!(error.contains("`_class_name`") && error.contains("LMSDiscreteScheduler") && error.contains(EULER), "{error}");
    config.with_override("euler").unwrap().scheduler(20).unwrap();
}

#[test]
fn files_that_are_no_configs_are_refused() {
    for (text, problem) in [
        ("{", "not valid JSON"),
        ("[]", "not a JSON object"),
        ("{}", "`_class_name` is missing"),
        (r#"{"_class_name": 3}"#, "`_class_name`"),
        (r#"{"_class_name": "DDIMScheduler", "clip_sample": Maybe}"#, "not valid JSON"),
    ] {
        let message = read(text).unwrap_err().to_string();
        assert!(message.contains(problem) && message.contains("scheduler_config.json"), "{message}");
    }
    assert!(matches!(SchedulerConfig::read(&repo("no/such/file.json")).unwrap_err(), Error::Read { .. }));
}

#[test]
fn infinity_is_read_as_python_writes_it() {
    let text =
        r#"{"_class_name": "DPMSolverMultistepScheduler", "lambda_min_clipped": -Infinity, "note": "a \"NaN\" -Infinity"}"#;
    let timesteps = |config: SchedulerConfig| config.scheduler(20).unwrap().timesteps().to_vec();
    assert_eq!(timesteps(read(text).unwrap()), timesteps(config(DPM, json!({}))));
    let text = r#"{"_class_name": "EulerDiscreteScheduler", "sigma_max": Infinity}"#;
    assert!(refusal(&read(text).unwrap(), 20).to_string().contains("`sigma_max`"));
}

fn any_value() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        (-3..2000_i64).prop_map(Value::from),
        (-1.0..20.0_f64).prop_map(Value::from),
        prop::sample::select(vec![
            "linspace",
            "leading",
            "trailing",
            "epsilon",
            "v_prediction",
            "sample",
            "zero",
            "sigma_min",
            "heun",
            "log_linear",
            "continuous",
            "scaled_linear",
            "squaredcos_cap_v2",
            "deis",
            "no such word",
        ])
        .prop_map(Value::from),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, failure_persistence: None, ..ProptestConfig::default() })]

    /// Every config gives a sampler with finite timesteps or an error, and never a panic.
    #[test]
    fn no_config_panics(
        class in prop::sample::select(SchedulerKind::ALL.map(SchedulerKind::class).to_vec()),
        keys in prop::collection::btree_map(prop::sample::select(vec![
            "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "timestep_spacing", "steps_offset", "prediction_type",
            "rescale_betas_zero_snr", "use_karras_sigmas", "use_exponential_sigmas", "sigma_min", "sigma_max", "final_sigmas_type",
            "interpolation_type", "timestep_type", "clip_sample", "rho", "original_inference_steps", "skip_prk_steps", "variance_type", "predict_x0", "algorithm_type", "lambda_min_clipped", "solver_order", "solver_type", "set_alpha_to_one",
        ]), any_value(), 0..4),
        steps in 0..1100_usize,
    ) {
        let keys = Value::Object(keys.into_iter().map(|(key, value)| (key.to_owned(), value)).collect());
        if let Ok(mut scheduler) = config(class, keys).scheduler(steps) {
            prop_assert!(scheduler.timesteps().iter().all(|timestep| timestep.is_finite()));
            prop_assert!(scheduler.init_noise_sigma().is_finite() && scheduler.init_noise_sigma() > 0.0);
            let sample = Tensor::ones([1, 1, 2, 2], (Kind::Float, tch::Device::Cpu));
            prop_assert!(scheduler.step(0, &sample, &sample, &mut Generator::new(0)).is_ok());
        }
    }
}
