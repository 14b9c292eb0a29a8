//! LoRAs merged at load, against diffusers and LyCORIS (`tests/golden/make_lora.py`).

use std::path::{Path, PathBuf};

use sdxl_squeeze::checkpoint::TensorSource;
use sdxl_squeeze::device::Placement;
use sdxl_squeeze::pipeline::{LoraFile, ModelFiles, PipelineFolder};
use tch::{Kind, Tensor};

use crate::squeeze::Squeeze;
use crate::support::{container, copy, relative_error, repo, tensors};

/// The scale in make_lora.py.
const SCALE: f64 = 0.75;

fn base() -> PathBuf {
    repo("tests/golden/base-like")
}

fn file(name: &str) -> PathBuf {
    repo(&format!("tests/golden/lora/{name}.safetensors"))
}

/// base-like with its weights in fp32.
fn in_fp32(folder: &Path) -> PathBuf {
    let model = folder.join("model");
    copy(&base(), &model);
    for part in ["unet/diffusion_pytorch_model", "text_encoder/model", "text_encoder_2/model"] {
        let path = model.join(format!("{part}.safetensors"));
        let widened = tensors(&path).into_iter().map(|(name, tensor)| (name, tensor.to_kind(Kind::Float)));
        Tensor::write_safetensors(&widened.collect::<Vec<_>>(), &path).unwrap();
    }
    model
}

fn opened(model: &Path, loras: &[(&str, f64)]) -> PipelineFolder {
    let loras = loras.iter().map(|(name, scale)| LoraFile { path: file(name), scale: *scale }).collect();
    PipelineFolder::open_files(&ModelFiles { loras, ..ModelFiles::of(model) }).unwrap()
}

/// The tensor `name` of a part.
fn tensor(pipeline: &PipelineFolder, part: &str, name: &str, shape: &[i64]) -> Tensor {
    let weights = match part {
        "unet" => pipeline.unet_weights().unwrap(),
        encoder => pipeline.text_weights(pipeline.text_encoders.iter().find(|part| part.encoder == encoder).unwrap()).unwrap(),
    };
    weights.source(Placement::CPU).tensor(name, shape).unwrap()
}

#[test]
fn merged_weights_are_those_of_diffusers_and_lycoris() {
    let folder = tempfile::tempdir().unwrap();
    let model = in_fp32(folder.path());
    let plain = opened(&model, &[]);
    let expected = tensors(&file("merged"));
    for case in ["diffusers", "kohya", "sgm", "dora", "lycoris", "dora-kohya"] {
        let scale = if case == "dora-kohya" { 1.0 } else { SCALE };
        let merged = opened(&model, &[(case, scale)]);
        let mut compared = 0;
        for (key, theirs) in expected.iter().filter(|(key, _)| key.starts_with(&format!("{case}/"))) {
            let (part, name) = key[case.len() + 1..].split_once('/').unwrap();
            let ours = tensor(&merged, part, name, &theirs.size());
            let error = relative_error(&ours, theirs);
            assert!(error < 1e-6, "{key}: {error:.1e}");
            assert!(relative_error(&tensor(&plain, part, name, &theirs.size()), theirs) > 1e-3, "{key} is not changed");
            compared += 1;
        }
        assert!(compared >= 4, "{case}: {compared}");
    }
}

#[test]
fn a_merged_weight_is_rounded_once_to_the_stored_dtype() {
    let name = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.weight";
    let folder = tempfile::tempdir().unwrap();
    let wide = tensor(&opened(&in_fp32(folder.path()), &[("kohya", 1.0)]), "unet", name, &[16, 16]);
    let stored = tensor(&opened(&base(), &[("kohya", 1.0)]), "unet", name, &[16, 16]);
    assert_eq!(stored, wide.to_kind(Kind::Half).to_kind(Kind::Float));
}

#[test]
fn what_matches_nothing_is_an_error_unless_it_is_ignored() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("strange.safetensors");
    let mut strange: Vec<(String, Tensor)> = tensors(&file("kohya")).into_iter().collect();
    let factor = |shape: [i64; 2]| Tensor::ones(shape, (Kind::Float, tch::Device::Cpu));
    strange.push(("lora_unet_down_blocks_9_attentions_0_proj_in.lora_down.weight".into(), factor([2, 16])));
    strange.push(("lora_unet_down_blocks_9_attentions_0_proj_in.lora_up.weight".into(), factor([16, 2])));
    Tensor::write_safetensors(&strange, &path).unwrap();
    let draw = Squeeze::new("generate").model(base()).with("--prompt", "a cat").with("--steps", "1").with("-o", "/dev/null");
    let draw = draw.with("--lora", &path);
    draw.is_refused(&["2 tensors match no module", "down_blocks_9", "--lora-ignore"]);
    draw.clone().with("--lora-ignore", "lora_unet_down_blocks_9.*").succeeds();

    let swapped = folder.path().join("swapped.safetensors");
    let stem = "lora_unet_down_blocks_1_attentions_0_proj_in";
    let parts = |down: [i64; 2]| {
        [(format!("{stem}.lora_down.weight"), factor(down)), (format!("{stem}.lora_up.weight"), factor([16, 2]))]
    };
    Tensor::write_safetensors(&parts([2, 17]), &swapped).unwrap();
    let refused = |path: &Path, parts: &[&str]| {
        Squeeze::new("export")
            .arg(base())
            .with("--to", "coreml")
            .with("--lora", path)
            .out(folder.path().join("x.mlpackage"))
            .is_refused(parts)
    };
    refused(&swapped, &[stem, "[16, 17]", "[16, 16]"]);
    Tensor::write_safetensors(&parts([3, 16]), &swapped).unwrap();
    refused(&swapped, &[stem, "no product"]);
    Tensor::write_safetensors(&parts([2, 16])[..1], &swapped).unwrap();
    refused(&swapped, &[stem, "make no LoRA"]);
    let none: [(String, Tensor); 0] = [];
    Tensor::write_safetensors(&none, &swapped).unwrap();
    refused(&swapped, &["has no tensors"]);
}

#[test]
fn damaged_loras_are_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.safetensors");
    let full = |shape: &[i64], value: f64| Tensor::full(shape, value, (Kind::Float, tch::Device::Cpu));
    let (down, up) = (full(&[2, 16], 1.0), full(&[16, 2], 1.0));
    let low = |more: Vec<(&'static str, Tensor)>| {
        let factors = [("lora_down.weight", down.shallow_clone()), ("lora_up.weight", up.shallow_clone())];
        factors.into_iter().chain(more).collect::<Vec<_>>()
    };
    let cases: [(Vec<(&str, Tensor)>, &str); 9] = [
        (vec![("lora_down.weight", full(&[], 1.0)), ("lora_up.weight", full(&[], 1.0))], "is of shape []"),
        (vec![("lora_down.weight", full(&[2, 16], f64::NAN)), ("lora_up.weight", full(&[16, 2], 1.0))], "NaN"),
        (vec![("lora_down.weight", full(&[2, 16], 1e30)), ("lora_up.weight", full(&[16, 2], 1e30))], "not finite"),
        (low(vec![("alpha", full(&[2], 1.0))]), "is not one number"),
        (low(vec![("dora_scale", full(&[3, 1], 1.0))]), "has 3 norms"),
        (low(vec![("dora_scale", full(&[16, 1], 1.0)), ("lora_magnitude_vector", full(&[16], 1.0))]), "are the same norms"),
        (low(vec![("lokr_w1", full(&[4, 4], 1.0))]), "does not belong"),
        (vec![("lokr_w1", full(&[3, 3], 1.0)), ("lokr_w2", full(&[5, 5], 1.0))], "[15, 15]"),
        (vec![("diff_b", full(&[3], 1.0))], "1 tensor matches no module"),
    ];
    let draw = Squeeze::new("generate").model(base()).with("--prompt", "a cat").with("--steps", "1").with("-o", "/dev/null");
    for (tensors, expected) in cases {
        let named = tensors.iter().map(|(name, tensor)| (format!("lora_unet_down_blocks_1_attentions_0_proj_in.{name}"), tensor));
        Tensor::write_safetensors(&named.collect::<Vec<_>>(), &path).unwrap();
        draw.clone().with("--lora", &path).is_refused(&[expected]);
    }
}

#[test]
fn containers_list_their_loras_and_a_lora_of_zeros_changes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let zero = folder.path().join("zero.safetensors");
    let zeros = tensors(&file("kohya")).into_iter().map(|(name, tensor)| (name, tensor.zeros_like()));
    Tensor::write_safetensors(&zeros.collect::<Vec<_>>(), &zero).unwrap();
    let config = folder.path().join("config.yaml");
    std::fs::write(&config, "solver: sequential\npalettize: {}\n").unwrap();
    let data = |name: &str, loras: &[String]| {
        let out = folder.path().join(name);
        let run = Squeeze::new("compress").config_file(&config).model(base()).out(&out);
        loras.iter().fold(run, |run, lora| run.with("--lora", lora)).succeeds();
        let bytes = container(&out);
        let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let metadata: serde_json::Value = serde_json::from_slice(&bytes[8..8 + header]).unwrap();
        let sources: serde_json::Value = serde_json::from_str(metadata["__metadata__"]["sources"].as_str().unwrap()).unwrap();
        (bytes[8 + header..].to_vec(), sources)
    };
    let (plain, sources) = data("plain", &[]);
    assert!(sources.as_array().unwrap().iter().all(|source| source.get("scale").is_none()));
    let (unchanged, _) = data("zero", &[format!("{}", zero.display())]);
    assert!(unchanged == plain);
    let loras = [format!("{}:0.5", file("kohya").display()), format!("{}", file("sgm").display())];
    let (changed, sources) = data("both", &loras);
    assert!(changed != plain);
    let listed: Vec<_> = sources.as_array().unwrap().iter().filter(|source| source.get("scale").is_some()).collect();
    assert_eq!(listed.len(), 2);
    assert_eq!((listed[0]["file"].as_str(), listed[0]["scale"].as_f64()), (Some("lora/kohya.safetensors"), Some(0.5)));
    assert_eq!((listed[1]["file"].as_str(), listed[1]["scale"].as_f64()), (Some("lora/sgm.safetensors"), Some(1.0)));
    // A container's UNet has its LoRAs in it, and takes no more.
    let container = folder.path().join("both/unet.squeezed.safetensors");
    let export = Squeeze::new("export").arg(&container).with("--lora", file("sgm")).out(folder.path().join("x.mlpackage"));
    export.clone().with("--to", "coreml").is_refused(&["--lora has no effect on a container without --model"]);
    export.with("--to", "coremltools").is_refused(&["--lora has no effect with this --to"]);
    let text = std::fs::read_to_string(folder.path().join("both/resolved.yaml")).unwrap();
    assert!(text.contains("kohya.safetensors:0.5"), "{text}");
}
