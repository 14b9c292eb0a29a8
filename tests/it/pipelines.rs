//! Whole pipelines, compared with diffusers: token ids, text states, every stage, predictions,
//! latents, pictures.
//!
//! `tests/golden/README.md` describes how the reference files were made.

use std::path::Path;

use sdxl_squeeze::device::Placement;
use sdxl_squeeze::model::Unobserved;
use sdxl_squeeze::model::unet::{Conditioning, StageName, Unet};
use sdxl_squeeze::model::vae::VaeDecoder;
use sdxl_squeeze::picture::Picture;
use sdxl_squeeze::pipeline::{Guidance, PipelineFolder, PromptEncoder, sample, time_ids};
use sdxl_squeeze::progress::Silent;
use sdxl_squeeze::random::{Generator, noise};
use serde_json::Value;
use tch::{Kind, Tensor};

use crate::support::{Checker, emoji, repo};

#[test]
fn the_bundled_model_equals_diffusers() {
    equals_diffusers(&emoji());
}

#[test]
fn a_small_base_equals_diffusers() {
    equals_diffusers(&repo("tests/golden/base-like"));
}

#[test]
fn a_small_refiner_equals_diffusers() {
    equals_diffusers(&repo("tests/golden/refiner-like"));
}

/// The model also covers shards and bf16 (UNet), the `.fp16` variant (text encoder), convolutional
/// projections, and normalized latents.
#[test]
fn a_small_v_prediction_model_equals_diffusers() {
    equals_diffusers(&repo("tests/golden/v-prediction"));
}

fn equals_diffusers(root: &Path) {
    computes_the_reference_of(root, &PipelineFolder::open(root).unwrap());
}

/// Asserts that a pipeline computes what diffusers computed with the folder `root`.
pub(crate) fn computes_the_reference_of(root: &Path, folder: &PipelineFolder) {
    let mut check = Checker::new(&root.join("reference.safetensors"), 1e-4);
    let notes: Value = serde_json::from_str(&std::fs::read_to_string(root.join("reference.json")).unwrap()).unwrap();
    let encoder = PromptEncoder::load(folder, Placement::CPU).unwrap();
    texts(&mut check, folder, &encoder, &notes);

    let weights = folder.unet_weights().unwrap();
    let unet = Unet::resident(folder.unet.clone(), weights.source(Placement::CPU), &Silent).unwrap();
    for at in ["", "odd/"] {
        if check.has(&format!("{at}noise")) {
            predictions(&mut check, folder, &unet, &notes, at);
        }
    }
    runs(&mut check, folder, &unet, &encoder, &notes);
    // The tests of the schedulers compare sigmas, so they are not compared here.
    check.finish(&root.display().to_string(), |key| key.ends_with("sigmas"));
}

fn text<'a>(notes: &'a Value, key: &str) -> Option<&'a str> {
    notes[key].as_str()
}

fn texts(check: &mut Checker, folder: &PipelineFolder, encoder: &PromptEncoder, notes: &Value) {
    let positive = encoder.encode(&[text(notes, "prompt").unwrap()]).unwrap();
    check.close("prompt_embeds", &positive.states);
    check.close("pooled_prompt_embeds", &positive.pooled);
    let negative = encoder.negative(folder, None, &positive).unwrap();
    check.close("negative_prompt_embeds", &negative.states);
    check.close("negative_pooled_prompt_embeds", &negative.pooled);
    for (at, key) in [
        ("", "prompt"),
        ("negative/", "negative/prompt"),
        ("empty/", "empty/prompt"),
        ("typed_eos/", "typed_eos/prompt"),
        ("long/", "long/prompt"),
    ] {
        let Some(prompt) = text(notes, key) else { continue };
        for part in &folder.text_encoders {
            let ids = folder.tokenizer(part).unwrap().encode(prompt).unwrap().ids;
            check.equal(&format!("{at}{}.input_ids", part.tokenizer), &Tensor::from_slice(&ids).unsqueeze(0));
        }
        let (states, pooled) = match at {
            "negative/" | "empty/" => ("negative_prompt_embeds", "negative_pooled_prompt_embeds"),
            _ => ("prompt_embeds", "pooled_prompt_embeds"),
        };
        let embedding = encoder.encode(&[prompt]).unwrap();
        check.close(&format!("{at}{states}"), &embedding.states);
        check.close(&format!("{at}{pooled}"), &embedding.pooled);
    }
}

fn size(notes: &Value, at: &str) -> (i64, i64) {
    let number = |name: &str| notes[format!("{at}{name}")].as_i64().unwrap();
    (number("height"), number("width"))
}

fn predictions(check: &mut Checker, folder: &PipelineFolder, unet: &Unet, notes: &Value, at: &str) {
    let (height, width) = size(notes, at);
    let seed = notes["seed"].as_u64().unwrap();
    let scale = folder.vae.scale();
    let noise = noise(&[1, 4, height / scale, width / scale], seed, Kind::Float).unwrap();
    check.equal(&format!("{at}noise"), &noise);
    let ids = time_ids(folder, height, width, false, Placement::CPU).unwrap();
    check.equal(&format!("{at}time_ids"), &ids);
    if folder.requires_aesthetics_score {
        check.equal(&format!("{at}negative_time_ids"), &time_ids(folder, height, width, true, Placement::CPU).unwrap());
    }
    let conditioning = Conditioning {
        encoder_hidden_states: check.get("prompt_embeds").shallow_clone(),
        text_embeds: check.get("pooled_prompt_embeds").shallow_clone(),
        time_ids: ids,
        timestep_cond: None,
    };
    for timestep in [1, 500, 967] {
        let output = unet.forward(&noise, f64::from(timestep), &conditioning, &mut Unobserved).unwrap();
        check.close(&format!("{at}unet@{timestep}/output"), &output);
    }

    // Running the stages one by one gives the same states and output.
    let weights = folder.unet_weights().unwrap();
    let source = weights.source(Placement::CPU);
    let stages = format!("{at}unet@500");
    let mut carry =
        folder.unet.load_input_block(&source).unwrap().forward(&noise, 500.0, &conditioning, &mut Unobserved).unwrap();
    check.close(&format!("{stages}/conv_in"), &carry.hidden_states);
    check.close(&format!("{stages}/temb"), &carry.temb);
    for spec in folder.unet.stages() {
        let before = carry.down_block_res_samples.len();
        carry = spec.load(&source).unwrap().forward(carry, &mut Unobserved).unwrap();
        check.close(&format!("{stages}/{}/hidden_states", spec.name()), &carry.hidden_states);
        if let (StageName::Down(_), "") = (spec.name(), at) {
            for (k, residual) in carry.down_block_res_samples[before..].iter().enumerate() {
                check.close(&format!("{stages}/{}/residual.{k}", spec.name()), residual);
            }
        }
    }
    let output = folder.unet.load_output_block(&source).unwrap().forward(&carry, &mut Unobserved).unwrap();
    check.close(&format!("{stages}/output"), &output);
}

/// A run of the pipeline whose results are in the reference.
struct Run<'a> {
    at: &'a str,
    negative_prompt: Option<&'a str>,
    guidance: f64,
    steps: usize,
    size: (i64, i64),
    scheduler: Option<&'a str>,
}

fn runs(check: &mut Checker, folder: &PipelineFolder, unet: &Unet, encoder: &PromptEncoder, notes: &Value) {
    let steps = notes["num_inference_steps"].as_u64().unwrap() as usize;
    let guidance = notes["guidance_scale"].as_f64().unwrap();
    let usual = Run { at: "", negative_prompt: None, guidance, steps, size: size(notes, ""), scheduler: None };
    run(check, folder, unet, encoder, notes, &usual);
    if check.has("odd/final_latents") {
        run(check, folder, unet, encoder, notes, &Run { at: "odd/", size: size(notes, "odd/"), ..usual });
        run(
            check,
            folder,
            unet,
            encoder,
            notes,
            &Run { at: "negative/", negative_prompt: text(notes, "negative/prompt"), ..usual },
        );
        run(check, folder, unet, encoder, notes, &Run { at: "empty/", negative_prompt: Some(""), ..usual });
        run(check, folder, unet, encoder, notes, &Run { at: "noguidance/", guidance: 1.0, ..usual });
    }
    let schedulers: Vec<String> =
        check.reference.keys().filter(|key| key.starts_with("scheduler/") && key.ends_with("/final_latents")).cloned().collect();
    for key in schedulers {
        let at = key.strip_suffix("final_latents").unwrap();
        let (name, steps) = at.trim_start_matches("scheduler/").trim_end_matches('/').split_once('@').unwrap();
        run(check, folder, unet, encoder, notes, &Run { at, scheduler: Some(name), steps: steps.parse().unwrap(), ..usual });
    }
}

fn run(check: &mut Checker, folder: &PipelineFolder, unet: &Unet, encoder: &PromptEncoder, notes: &Value, run: &Run) {
    let prompt = text(notes, "prompt").unwrap();
    let guidance = Guidance::encode(encoder, folder, prompt, run.negative_prompt, run.guidance, run.size).unwrap();
    let config = match run.scheduler {
        Some(name) => folder.scheduler.with_override(name).unwrap(),
        None => folder.scheduler.clone(),
    };
    let mut scheduler = config.scheduler(run.steps).unwrap();
    let timesteps = match run.at {
        "" => "scheduler.timesteps".to_owned(),
        at => format!("{at}timesteps"),
    };
    if check.has(&timesteps) {
        let ours = Tensor::from_slice(scheduler.timesteps()).to_kind(check.get(&timesteps).kind());
        // Timesteps with fractions are computed from fp32 logarithms, so they are not exactly
        // equal.
        let whole = scheduler.timesteps().iter().all(|timestep| timestep.fract() == 0.0);
        if whole { check.equal(&timesteps, &ours) } else { check.close(&timesteps, &ours) }
    }
    let scale = folder.vae.scale();
    let shape = [1, 4, run.size.0 / scale, run.size.1 / scale];
    let noise = noise(&shape, notes["seed"].as_u64().unwrap(), Kind::Float).unwrap();
    let latents =
        sample(unet, scheduler.as_mut(), &guidance, &noise, &mut Generator::new(231), &mut |_, _| Ok(()), &Silent).unwrap();
    check.close(&format!("{}final_latents", run.at), &latents);

    let image = format!("{}image", run.at);
    if check.has(&image) {
        let weights = folder.vae_weights().unwrap();
        let vae = VaeDecoder::load(&folder.vae, &weights.source(Placement::CPU)).unwrap();
        let decoded = vae.forward(&vae.unscale(&latents).unwrap()).unwrap();
        check.close(&image, &Picture::to_unit(&decoded).unwrap());
    }
}
