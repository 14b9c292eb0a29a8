//! The further samplers against diffusers' (tests/golden/make_samplers.py), with the noise of
//! torch's generator, and what their configs may not ask for.

use sdxl_squeeze::Error;
use sdxl_squeeze::model::scheduler::{SchedulerConfig, SpacingKind};
use sdxl_squeeze::random::Generator;
use serde::Deserialize;
use serde_json::{Value, json};
use tch::{Kind, Tensor};

use crate::schedulers::{config, error, predict, read, refusal};
use crate::support::{repo, tensors};

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

/// How far a sample may be off. Its first picture is divided by 1 / 20,000 in the last case, which
/// makes much of the last bits.
fn bound(name: &str) -> f64 {
    if name == "unipc/karras-cosine" { 1e-4 } else { 2e-6 }
}

#[test]
fn every_further_sampler_equals_that_of_diffusers() {
    let golden = tensors(&repo("tests/golden/samplers.safetensors"));
    let cases: Vec<Case> = serde_json::from_str(&std::fs::read_to_string(repo("tests/golden/samplers.json")).unwrap()).unwrap();
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
            if apart > 1.3e-4 || apart_init > 2.5e-7 || apart_sample.is_nan() || apart_sample > bound(name) {
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

#[test]
fn keys_that_the_further_samplers_lack_are_refused_by_name() {
    let flow = json!({"use_flow_sigmas": true});
    let cases: [(&str, &str, Value); 26] = [
        ("EulerAncestralDiscreteScheduler", "prediction_type", json!({"prediction_type": "sample"})),
        ("LCMScheduler", "original_inference_steps", json!({"original_inference_steps": 0})),
        ("LCMScheduler", "original_inference_steps", json!({"original_inference_steps": 1001})),
        ("LCMScheduler", "thresholding", json!({"thresholding": true})),
        ("LCMScheduler", "prediction_type", json!({"rescale_betas_zero_snr": true})),
        ("TCDScheduler", "original_inference_steps", json!({"original_inference_steps": 2000})),
        ("DDPMScheduler", "variance_type", json!({"variance_type": "learned_range"})),
        ("DDPMScheduler", "variance_type", json!({"variance_type": "fixed_large_log"})),
        ("DDPMScheduler", "thresholding", json!({"thresholding": true})),
        ("DDPMScheduler", "beta_schedule", json!({"beta_schedule": "exp"})),
        ("HeunDiscreteScheduler", "beta_schedule", json!({"beta_schedule": "sigmoid"})),
        ("HeunDiscreteScheduler", "use_beta_sigmas", json!({"use_beta_sigmas": true})),
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
        ("EDMDPMSolverMultistepScheduler", "solver_order", json!({"solver_order": 3})),
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
    let brownian = euler.with_override("DPMSolverSDEScheduler").unwrap_err().to_string();
    assert!(brownian.contains("Brownian tree") && brownian.contains("dpmpp-2m-sde"), "{brownian}");
}

#[test]
fn timesteps_say_how_often_the_model_is_called() {
    let calls =
        |class: &str, steps: usize| config(class, json!({"skip_prk_steps": true})).scheduler(steps).unwrap().timesteps().len();
    assert_eq!([1, 2, 20].map(|steps| calls("HeunDiscreteScheduler", steps)), [1, 3, 39]);
    assert_eq!([1, 2, 20].map(|steps| calls("PNDMScheduler", steps)), [1, 3, 21]);
}
