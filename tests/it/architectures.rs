//! UNets of every architecture: sizes, what diffusers computes with them, and every stage of the
//! program on the unusual ones.

use std::path::{Path, PathBuf};

use sdxl_squeeze::checkpoint::TensorSpec;
use sdxl_squeeze::device::Placement;
use sdxl_squeeze::model::Unobserved;
use sdxl_squeeze::model::unet::{Conditioning, Unet, UnetChain, UnetConfig, guidance_scale_embedding};
use sdxl_squeeze::pipeline::{PipelineFolder, PromptEncoder};
use sdxl_squeeze::progress::Silent;
use sdxl_squeeze::random::noise;
use sdxl_squeeze::synth::Preset;
use serde_json::{Value, json};
use tch::{Kind, Tensor};

use crate::squeeze::Squeeze;
use crate::support::{Checker, copy, repo};

/// The small UNets of `tests/golden/architectures`.
pub(crate) const NAMES: [&str; 5] = ["ssd-like", "koala-like", "lcm-like", "inpainting-like", "edit-like"];

/// The prompt, seed, steps and guidance of the golden pictures, which are those of base-like.
pub(crate) const PROMPT: &str = "a picture of a cat's face, 2 red apples & a dog!";
pub(crate) const SEED: u64 = 231;
pub(crate) const STEPS: usize = 10;
pub(crate) const GUIDANCE: f64 = 4.0;

/// A whole pipeline around a small UNet: all else is that of base-like.
pub(crate) fn pipeline(name: &str, root: &Path) -> PathBuf {
    let model = root.join(name);
    copy(&repo("tests/golden/base-like"), &model);
    std::fs::remove_dir_all(model.join("unet")).unwrap();
    copy(&repo("tests/golden/architectures").join(name).join("unet"), &model.join("unet"));
    model
}

/// A golden file.
pub(crate) fn golden(file: &str) -> PathBuf {
    repo("tests/golden/architectures").join(file)
}

pub(crate) fn checker(file: &str) -> Checker {
    Checker::new(&golden(file), 1e-4)
}

/// Of `make_architectures.py count`, which asks diffusers; the published sums are 2.57 G (base),
/// 2.26 G (refiner), 1.33 G (SSD-1B), 0.745 G (Vega), 0.78 G and 1.16 G (KOALA).
const PARAMETERS: [(&str, u64); 9] = [
    ("sdxl-base", 2_567_463_684),
    ("sdxl-refiner", 2_259_526_660),
    ("sdxl-inpainting", 2_567_478_084),
    ("sdxl-edit", 2_567_475_204),
    ("lcm-sdxl", 2_567_545_604),
    ("ssd-1b", 1_331_334_404),
    ("vega", 745_225_604),
    ("koala-700m", 782_822_724),
    ("koala-1b", 1_161_184_324),
];

#[test]
fn presets_have_as_many_parameters_as_in_diffusers() {
    for (name, expected) in PARAMETERS {
        let preset: Preset = name.parse().unwrap();
        let chain = UnetChain::new(UnetConfig::parse(preset.unet_config()).unwrap());
        let parameters: u64 = chain.tensors().unwrap().iter().map(|tensor| tensor.numel()).sum();
        assert_eq!(parameters, expected, "{name}");
    }
    assert_eq!(Preset::all().count(), PARAMETERS.len() + 1);
}

/// 4 bits for each element of a weight of more than 2,048, 16 entries of fp16, and fp16 for the
/// rest.
#[test]
fn plans_of_presets_count_the_bytes_of_4_bit_palettes() {
    for (name, _) in PARAMETERS {
        let preset: Preset = name.parse().unwrap();
        let chain = UnetChain::new(UnetConfig::parse(preset.unet_config()).unwrap());
        let bytes = |tensor: &TensorSpec| match tensor.shape.len() >= 2 && tensor.numel() > 2048 {
            true => tensor.numel() / 2 + 32,
            false => 2 * tensor.numel(),
        };
        let expected: u64 = chain.tensors().unwrap().iter().map(bytes).sum();
        let plan = Squeeze::new("plan").arg("configs/dense-4bit.yaml").args(["--architecture", name, "--json"]);
        let plan: Vec<Value> = plan.args(["--calibration-nsamples", "8"]).succeeds().json();
        assert_eq!(plan[0]["plan"]["payload_bytes"], expected, "{name}");
    }
}

#[test]
fn predictions_equal_those_of_diffusers() {
    let root = tempfile::tempdir().unwrap();
    for name in NAMES {
        let mut check = checker(&format!("{name}/reference.safetensors"));
        let folder = PipelineFolder::open(&pipeline(name, root.path())).unwrap();
        let encoder = PromptEncoder::load(&folder, Placement::CPU).unwrap();
        let text = encoder.encode(&[PROMPT]).unwrap();
        let config = folder.unet.config();
        let timestep_cond = config.time_cond_proj_dim.map(|width| guidance_scale_embedding(GUIDANCE, width).unwrap());
        if let Some(told) = &timestep_cond {
            check.close("timestep_cond", told);
        }
        let conditioning = Conditioning {
            encoder_hidden_states: text.states,
            text_embeds: text.pooled,
            time_ids: Tensor::from_slice(&[64f32, 64.0, 0.0, 0.0, 64.0, 64.0]).unsqueeze(0),
            timestep_cond,
        };
        let sample = noise(&[1, config.in_channels, 8, 8], SEED, Kind::Float).unwrap();
        let weights = folder.unet_weights().unwrap();
        let unet = Unet::resident(folder.unet.clone(), weights.source(Placement::CPU), &Silent).unwrap();
        check.close("unet@500/output", &unet.forward(&sample, 500.0, &conditioning, &mut Unobserved).unwrap());
        check.finish(name, |key| key.ends_with("final_latents") || key.ends_with("image"));
    }
}

/// The message with which a config is refused; base-like's with changes.
fn refused(changes: Value) -> String {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("config.json");
    let text = std::fs::read_to_string(repo("tests/golden/base-like/unet/config.json")).unwrap();
    let mut config: Value = serde_json::from_str(&text).unwrap();
    config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    std::fs::write(&path, config.to_string()).unwrap();
    UnetConfig::read(&path).unwrap_err().to_string()
}

#[test]
fn depths_that_diffusers_refuses_are_refused() {
    let alone = refused(json!({ "transformer_layers_per_block": [1, [1, 2], 2] }));
    assert!(alone.contains("`transformer_layers_per_block` has a list for a level, which needs `reverse_"), "{alone}");
    let down = refused(json!({
        "transformer_layers_per_block": [1, [1], 2], "reverse_transformer_layers_per_block": [2, 1, 1],
    }));
    assert!(down.contains("`transformer_layers_per_block` has fewer entries at level 1 than its 2 transformers"), "{down}");
    let up = refused(json!({ "reverse_transformer_layers_per_block": [[2, 1], 1, 1] }));
    assert!(up.contains("`reverse_transformer_layers_per_block` has fewer entries at level 0 than its 3 transformers"), "{up}");
    let mid = refused(json!({ "mid_block_type": "UNetMidBlock2DSimpleCrossAttn" }));
    assert!(mid.contains("UNetMidBlock2D and null are"), "{mid}");
}

/// `inspect`, `plan`, `compress`, `verify`, `generate` with the container, and both exports.
#[test]
fn the_whole_program_runs_on_every_architecture() {
    let root = tempfile::tempdir().unwrap();
    for name in NAMES {
        let model = pipeline(name, root.path());
        let inspected = Squeeze::new("inspect").arg(&model).arg("--summary").succeeds();
        assert_eq!(inspected.text().contains("mid_block"), name != "koala-like", "{inspected}");
        let config = "tutorial-s50-4bit-gs4";
        let planned = Squeeze::new("plan").arg(repo(&format!("configs/{config}.yaml"))).model(&model).succeeds();
        assert_eq!(planned.text().contains("`mid_block` in `layers` names no stage here"), name == "koala-like", "{planned}");
        let out = root.path().join(format!("{name}.out"));
        Squeeze::new("compress").config(config).model(&model).out(&out).samples(4, 2).succeeds();
        let container = out.join("unet.squeezed.safetensors");
        Squeeze::new("verify").arg(&container).succeeds();
        if name == "lcm-like" {
            // The file of samples has the guidance scale too: from it comes the same container.
            let (samples, again) = (root.path().join("samples.safetensors"), root.path().join("again"));
            let run = Squeeze::new("compress").config(config).model(&model).samples(4, 2);
            run.out(root.path().join("first")).with("--samples-out", &samples).succeeds();
            let run = Squeeze::new("compress").config(config).model(&model).with("--calibration-nsamples", "4");
            run.out(&again).with("--samples", &samples).succeeds();
            let tensors = |out: &Path| crate::support::tensors(&out.join("unet.squeezed.safetensors"));
            assert_eq!(tensors(&again), tensors(&out));
        }
        let mut run = Squeeze::new("generate").model(&model).args(["--prompt", "a cat", "--steps", "2", "--overwrite"]);
        if ["inpainting-like", "edit-like"].contains(&name) {
            run = run.with("--image", golden("image.png"));
        }
        if name == "inpainting-like" {
            run = run.with("--mask", golden("mask.png"));
        }
        run.with("--unet", &container).with("-o", root.path().join("x.png")).succeeds();
        for layout in ["linear", "split-einsum"] {
            let package = root.path().join(format!("{name}-{layout}.mlpackage"));
            let export = Squeeze::new("export").arg(&container).args(["--to", "coreml", "--layout", layout]);
            export.with("--model", &model).out(&package).succeeds();
            Squeeze::new("verify").arg(&package).succeeds();
        }
    }
}
