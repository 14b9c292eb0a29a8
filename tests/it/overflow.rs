//! Activations beyond fp16, in a model that computes the same as the bundled one.

use std::path::{Path, PathBuf};

use sdxl_squeeze::device::Placement;
use sdxl_squeeze::model::Unobserved;
use sdxl_squeeze::model::unet::Unet;
use sdxl_squeeze::pipeline::{Guidance, PipelineFolder, PromptEncoder};
use sdxl_squeeze::progress::Silent;
use sdxl_squeeze::random::noise;
use serde_json::Value;
use tch::{Device, Kind, Tensor};

use crate::devices::content;
use crate::squeeze::Squeeze;
use crate::support::{container, copy, emoji, relative_error, report, tensors};

const RESNET: &str = "down_blocks.1.resnets.0";

/// A copy of the bundled model whose resnet has activations `scale` times as large between its two
/// norms, the second of which brings them back into range.
pub(crate) fn scaled(folder: &Path, scale: f64) -> PathBuf {
    let model = folder.join(format!("scaled-{scale:.0}"));
    copy(&emoji(), &model);
    let path = model.join("unet/diffusion_pytorch_model.safetensors");
    let mut all: Vec<(String, Tensor)> = tensors(&path).into_iter().collect();
    for (name, tensor) in &mut all {
        if ["conv1.", "time_emb_proj."].iter().any(|layer| name.starts_with(&format!("{RESNET}.{layer}"))) {
            let kind = tensor.kind();
            *tensor = (tensor.to_kind(Kind::Double) * scale).to_kind(kind);
            assert!(bool::try_from(tensor.isfinite().all()).unwrap(), "{name}");
        }
    }
    Tensor::write_safetensors(&all, &path).unwrap();
    model
}

fn unet(model: &Path, kind: Kind) -> Unet<'static> {
    let folder = PipelineFolder::open(model).unwrap();
    let weights = folder.unet_weights().unwrap();
    Unet::resident(folder.unet.clone(), weights.source(Placement { device: Device::Cpu, kind }), &Silent).unwrap()
}

#[test]
fn a_stage_beyond_fp16_predicts_in_bf16_from_then_on() {
    let folder = tempfile::tempdir().unwrap();
    let model = scaled(folder.path(), 1e5);
    let conditioning = |kind| {
        let pipeline = PipelineFolder::open(&model).unwrap();
        let encoder = PromptEncoder::load(&pipeline, Placement { device: Device::Cpu, kind }).unwrap();
        Guidance::encode(&encoder, &pipeline, "an owl", None, 4.0, (64, 64)).unwrap().conditioning
    };
    let sample = noise(&[2, 4, 8, 8], 5, Kind::Float).unwrap();
    let exact = unet(&model, Kind::Float).predict(&sample, 500.0, &conditioning(Kind::Float)).unwrap();
    let (half, told) = (sample.to_kind(Kind::Half), conditioning(Kind::Half));
    let narrow = unet(&model, Kind::Half);
    let plain = narrow.forward(&half, 500.0, &told, &mut Unobserved).unwrap();
    assert!(!bool::try_from(plain.isfinite().all()).unwrap(), "the plain forward does not overflow");
    assert!(narrow.beyond_half().is_empty());

    let first = narrow.predict(&half, 500.0, &told).unwrap();
    assert_eq!(first.kind(), Kind::Half);
    let error = relative_error(&first, &exact);
    assert!(error < 0.02, "{error}");
    let notes = narrow.beyond_half();
    assert_eq!(notes, ["the activations of `down_blocks.1` are beyond fp16, which ends at 65504; it computes in bf16"]);
    // The same again, whether or not the stage was known before.
    assert_eq!(narrow.predict(&half, 500.0, &told).unwrap(), first);
    assert_eq!(narrow.beyond_half(), notes);

    // The bundled model has nothing to repeat.
    let usual = unet(&emoji(), Kind::Half);
    assert_eq!(usual.predict(&half, 500.0, &told).unwrap(), usual.forward(&half, 500.0, &told, &mut Unobserved).unwrap());
    assert!(usual.beyond_half().is_empty());
}

#[test]
fn a_picture_beyond_fp16_is_drawn_and_the_log_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let model = scaled(folder.path(), 1e5);
    let draw = |name: &str, model: &Path| {
        let run = Squeeze::new("generate").model(model).args(["--prompt", "an owl", "--steps", "3", "--dtype", "f16"]);
        let latents = folder.path().join(format!("{name}.safetensors"));
        let run = run.with("--latents-out", &latents).with("-o", folder.path().join(format!("{name}.png")));
        (run.succeeds().text(), tensors(&latents)["latents"].shallow_clone())
    };
    let (said, ours) = draw("scaled", &model);
    let said_once = said.matches("the activations of `down_blocks.1` are beyond fp16").count() == 1;
    assert!(said_once && said.contains("it computes in bf16"), "{said}");
    let (said, theirs) = draw("usual", &emoji());
    assert!(!said.contains("beyond fp16"), "{said}");
    let error = relative_error(&ours, &theirs);
    assert!(error < 0.05, "{error}");
}

/// The errors of the calibrated layers, in order.
fn errors(report: &Value) -> Vec<f64> {
    let layers = report["layers"].as_array().unwrap().iter();
    layers.filter_map(|layer| layer["errors"]["output"].as_f64()).collect()
}

#[test]
fn a_run_with_activations_beyond_fp16_ends_well_and_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let model = scaled(folder.path(), 1e5);
    // Only the stage that overflows is compressed.
    let rules = "module_name_configs: {'down_blocks\\.1\\..*': ";
    let settings = format!(
        "prune:\n  {rules}{{target_sparsity: 0.4}}}}\npalettize:\n  {rules}{{granularity: per_grouped_channel, group_size: 16}}}}\n"
    );
    for (config, how) in [("sequential", ""), ("joint", "solver: joint\nsequencing: sublayer\ntarget: dense\n")] {
        let file = folder.path().join(format!("{config}.yaml"));
        std::fs::write(&file, format!("{how}{settings}")).unwrap();
        let run = |name: &str, dtype: &str| {
            let out = folder.path().join(format!("{config}-{name}"));
            let ended = Squeeze::new("compress").config_file(&file).model(&model).out(&out).samples(4, 2).with("--dtype", dtype);
            let said = ended.succeeds().text();
            (out, said)
        };
        let (wide, wide_said) = run("f32", "f32");
        assert!(!wide_said.contains("beyond fp16"), "{wide_said}");
        let (first, said) = run("first", "f16");
        let (second, _) = run("second", "f16");
        assert!(container(&first) == container(&second), "{config}: another run, other bytes");
        let (ours, theirs) = (report(&first), report(&wide));
        let notes = ours["notes"].to_string();
        for part in [&format!("the activations of `{RESNET}"), "calibration runs: the activations of `down_blocks.1`"] {
            let part = if config == "sequential" { part.replace(".resnets.0", "") } else { part.to_string() };
            assert!(notes.contains(&part) && said.contains("beyond fp16"), "{config}: `{part}` is not in {notes}\n{said}");
        }
        // Nothing is counted twice.
        let vectors = |report: &Value| -> Vec<Value> {
            report["layers"].as_array().unwrap().iter().map(|layer| layer["vectors"].clone()).collect()
        };
        assert_eq!(vectors(&ours), vectors(&theirs), "{config}");
        let (ours, theirs) = (errors(&ours), errors(&theirs));
        assert_eq!(ours.len(), theirs.len());
        let mean = |errors: &[f64]| errors.iter().sum::<f64>() / errors.len() as f64;
        let ratio = mean(&ours) / mean(&theirs);
        assert!((0.95..1.05).contains(&ratio), "{config}: {ratio}");
    }
}

/// Each call is a batch of its own here, of which every second one is another device's.
#[test]
fn several_devices_repeat_beyond_fp16_what_one_does() {
    let folder = tempfile::tempdir().unwrap();
    let model = scaled(folder.path(), 1e5);
    let file = folder.path().join("joint.yaml");
    let rules = "module_name_configs: {'down_blocks\\.1\\.resnets.*': ";
    let how = "solver: joint\nsequencing: sublayer\ntarget: dense\ncalibration: {timestep_weighting: early}\n";
    std::fs::write(&file, format!("{how}palettize:\n  {rules}{{granularity: per_grouped_channel, group_size: 16}}}}\n")).unwrap();
    let run = |devices: &str| {
        let out = folder.path().join(devices);
        let run = Squeeze::new("compress").config_file(&file).model(&model).out(&out).samples(3, 3).with("--dtype", "f16");
        let said = run.with("--device", devices).succeeds().text();
        assert!(said.contains("beyond fp16"), "{said}");
        (content(&out), report(&out))
    };
    let ((header, data), one) = run("cpu");
    let ((other_header, other_data), two) = run("cpu,cpu");
    assert!(data == other_data, "other bytes on two devices");
    assert_eq!(header, other_header);
    assert_eq!((&one["layers"], &one["notes"]), (&two["layers"], &two["notes"]));
}

#[test]
fn what_no_dtype_holds_ends_with_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model");
    copy(&emoji(), &model);
    let path = model.join("unet/diffusion_pytorch_model.safetensors");
    let mut all: Vec<(String, Tensor)> = tensors(&path).into_iter().collect();
    // A chain of layers that each multiply by far more than their inputs become smaller.
    for (name, tensor) in &mut all {
        if name.starts_with(&format!("{RESNET}.conv_shortcut.")) || name.contains("attn1.to_v.") || name.contains("proj_out") {
            *tensor = tensor.sign() * 6e4;
        }
    }
    Tensor::write_safetensors(&all, &path).unwrap();
    let out = folder.path().join("out");
    let run = Squeeze::new("compress").config("tutorial-s40-4bit-gs16").model(&model).out(&out).samples(4, 2);
    for dtype in ["f16", "f32"] {
        let said = run.clone().with("--dtype", dtype).arg("--overwrite").ends_with(1).text();
        assert!(said.contains("NaN or inf"), "{dtype}: {said}");
    }
}
