//! `bundle --refiner`: the package of a refiner's UNet, fed as Apple's Swift pipeline feeds it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use sdxl_squeeze::container::Container;
use sdxl_squeeze::coreml::verify;
use sdxl_squeeze::device::Placement;
use sdxl_squeeze::input::SourceFile;
use sdxl_squeeze::model::Unobserved;
use sdxl_squeeze::model::unet::{Conditioning, Unet};
use sdxl_squeeze::pipeline::{PipelineFolder, UnetWeights};
use sdxl_squeeze::progress::Silent;
use sdxl_squeeze::random::noise;
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

use super::file::Package;
use super::interpreter::evaluate;
use super::made_up;
use super::parts::run;
use crate::squeeze::Squeeze;
use crate::support::{copy, emoji, relative_error, repo};

fn base() -> PathBuf {
    repo("tests/golden/base-like")
}

/// Edits the tensors of a file.
fn edit_tensors(path: &Path, edit: impl Fn(&str, Tensor) -> Tensor) {
    let tensors = Tensor::read_safetensors(path).unwrap();
    let tensors: Vec<(String, Tensor)> = tensors.into_iter().map(|(name, tensor)| (name.clone(), edit(&name, tensor))).collect();
    Tensor::write_safetensors(&tensors, path).unwrap();
}

/// The small refiner with the text encoder, the tokenizer and the VAE of the small base, as
/// `tests/golden/check_swift.py` makes it. Its UNet is told eight numbers more of pooled text.
fn refiner(folder: &Path, name: &str) -> PathBuf {
    let model = folder.join(name);
    copy(&repo("tests/golden/refiner-like"), &model);
    for part in ["text_encoder_2", "tokenizer_2", "vae"] {
        std::fs::remove_dir_all(model.join(part)).unwrap();
        copy(&base().join(part), &model.join(part));
    }
    let path = model.join("unet/config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    config["projection_class_embeddings_input_dim"] = json!(72);
    std::fs::write(&path, config.to_string()).unwrap();
    edit_tensors(&model.join("unet/diffusion_pytorch_model.safetensors"), |name, tensor| match name {
        "add_embedding.linear_1.weight" => Tensor::cat(&[tensor.narrow(1, 0, 8), tensor], 1),
        _ => tensor,
    });
    model
}

fn bundle(refiner: &Path) -> Squeeze {
    Squeeze::new("bundle").model(base()).with("--refiner", refiner)
}

/// The package of the refiner's UNet, given what Swift gives it, against the UNet in Rust.
fn check_step(out: &Path, refiner: &Path, weights: UnetWeights) {
    let pipeline = PipelineFolder::open(refiner).unwrap();
    let part = &pipeline.text_encoders[0];
    let tokenizer = pipeline.tokenizer(part).unwrap();
    // Row 0 is the negative prompt.
    let rows = ["", "an emoji of a red apple"].map(|text| Tensor::from_slice(&tokenizer.encode(text).unwrap().ids).unsqueeze(0));
    let encoded = rows.map(|ids| run(&out.join("TextEncoder2.mlpackage"), "input_ids", &ids.to_kind(Kind::Float)));
    let both = |name: &str| Tensor::cat(&[&encoded[0][name], &encoded[1][name]], 0);
    let (states, pooled) = (both("hidden_embeds"), both("pooled_outputs"));
    let time_ids = Tensor::from_slice(&[1024f32, 1024.0, 0.0, 0.0, 2.5, 1024.0, 1024.0, 0.0, 0.0, 6.0]).view([2, 5]);
    let sample = noise(&[1, 4, 8, 8], 231, Kind::Float).unwrap().repeat([2, 1, 1, 1]);
    let given = [
        ("sample", sample.shallow_clone()),
        ("timestep", Tensor::full([2], 181.0, (Kind::Float, Device::Cpu))),
        ("encoder_hidden_states", states.transpose(1, 2).unsqueeze(2)),
        ("time_ids", time_ids.shallow_clone()),
        ("text_embeds", pooled.shallow_clone()),
    ];
    let inputs: BTreeMap<String, Tensor> = given.into_iter().map(|(name, x)| (name.to_owned(), x)).collect();
    let made = evaluate(&mut Package::read(&out.join("UnetRefiner.mlpackage")), &inputs).remove("noise_pred").unwrap();
    let unet = Unet::resident(weights.chain().unwrap(), weights.source(Placement::CPU), &Silent).unwrap();
    let conditioning = Conditioning { encoder_hidden_states: states, text_embeds: pooled, time_ids, timestep_cond: None };
    let expected = unet.forward(&sample, 181.0, &conditioning, &mut Unobserved).unwrap();
    let error = relative_error(&made, &expected);
    assert!(error < 1e-4, "{error}");
    // The scores tell the rows apart.
    assert!(relative_error(&made.narrow(0, 0, 1), &made.narrow(0, 1, 1)) > 1e-3);
}

#[test]
fn a_bundle_has_the_refiner_that_swift_reads() {
    let folder = tempfile::tempdir().unwrap();
    let refiner = refiner(folder.path(), "refiner");
    let out = folder.path().join("Resources");
    let said = bundle(&refiner).out(&out).arg("--json").succeeds();
    let found = verify(&out.join("UnetRefiner.mlpackage")).unwrap();
    assert!(found.hashed && found.named);
    assert_eq!(
        found.inputs,
        [
            "sample: fp16 [2, 4, 8, 8]",
            "timestep: fp16 [2]",
            "encoder_hidden_states: fp16 [2, 24, 1, 77]",
            "time_ids: fp16 [2, 5]",
            "text_embeds: fp16 [2, 32]"
        ]
    );
    assert_eq!(verify(&out.join("Unet.mlpackage")).unwrap().inputs[3], "time_ids: fp16 [2, 6]");
    let pipeline = PipelineFolder::open(&refiner).unwrap();
    let weights = pipeline.unet_weights().unwrap();
    let dense = UnetWeights::Dense { weights: &weights, config: pipeline.unet_config(), prediction_type: None };
    check_step(&out, &refiner, dense);

    let script = std::fs::read_to_string(out.join("compile.sh")).unwrap();
    assert!(script.contains("compile \"$here/UnetRefiner.mlpackage\""), "{script}");
    let written: Value = serde_json::from_str(&said.stdout).unwrap();
    let files: Vec<SourceFile> = serde_json::from_value(written["files"].clone()).unwrap();
    let tops: BTreeSet<&str> = files.iter().map(|file| file.file.split('/').next().unwrap()).collect();
    assert!(tops.contains("UnetRefiner.mlpackage") && tops.len() == 8, "{tops:?}");
    let card = std::fs::read_to_string(out.join("README.md")).unwrap();
    let weights = "unet/diffusion_pytorch_model.safetensors";
    let source = SourceFile::read(&refiner.join(weights), weights).unwrap();
    for part in [
        "| `UnetRefiner.mlpackage` | the refiner's UNet",
        "`refinerStart`",
        "The refiner's UNet is not compressed",
        source.sha256.as_str(),
    ] {
        assert!(card.contains(part), "{part} is not in {card}");
    }
}

#[test]
fn a_refiner_can_be_compressed() {
    let folder = tempfile::tempdir().unwrap();
    let refiner = refiner(folder.path(), "refiner");
    let (container, out) = (folder.path().join("c.safetensors"), folder.path().join("Resources"));
    made_up::container(&refiner, &container);
    bundle(&refiner).with("--refiner-unet", &container).out(&out).succeeds();
    assert!(verify(&out.join("UnetRefiner.mlpackage")).unwrap().compressed > 0);
    assert_eq!(verify(&out.join("Unet.mlpackage")).unwrap().compressed, 0);
    let container = Container::open(&container).unwrap();
    check_step(&out, &refiner, UnetWeights::from(&container));
    let card = std::fs::read_to_string(out.join("README.md")).unwrap();
    assert!(
        card.contains("weights of the refiner's UNet are compressed") && card.contains("The UNet is not compressed"),
        "{card}"
    );
}

#[test]
fn what_is_no_refiner_of_the_model_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("Resources");
    let refused = |run: Squeeze, parts: &[&str]| {
        run.out(&out).is_refused(parts);
        assert!(!out.exists());
    };
    refused(bundle(&base()), &["no refiner", "requires_aesthetics_score"]);
    refused(bundle(&repo("tests/golden/refiner-like")), &["latents of another kind"]);
    let good = refiner(folder.path(), "good");
    let changed = |name: &str, change: &dyn Fn(&Path)| {
        let model = folder.path().join(name);
        copy(&good, &model);
        change(&model);
        model
    };
    let encoder = changed("encoder", &|model| {
        edit_tensors(&model.join("text_encoder_2/model.safetensors"), |name, tensor| match name {
            "text_projection.weight" => tensor * 2.0,
            _ => tensor,
        });
    });
    refused(bundle(&encoder), &["another `text_projection.weight`", "Apple's pipeline has one for both"]);
    let tokenizer = changed("tokenizer", &|model| {
        let path = model.join("tokenizer_2/merges.txt");
        let text = std::fs::read_to_string(&path).unwrap();
        let cut = text.trim_end().rfind('\n').unwrap();
        std::fs::write(&path, &text[..=cut]).unwrap();
    });
    refused(bundle(&tokenizer), &["its tokenizer is another"]);
    let edm = changed("edm", &|model| {
        // The class is that of the index, as in diffusers.
        let path = model.join("model_index.json");
        let index = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, index.replace("EulerDiscreteScheduler", "EDMEulerScheduler")).unwrap();
    });
    refused(bundle(&edm), &["is sampled by EDMEulerScheduler"]);
    refused(Squeeze::new("bundle").model(&good).with("--refiner", &good), &["is a refiner itself"]);
    refused(bundle(&emoji()), &["no refiner"]);
    let other = folder.path().join("c.safetensors");
    made_up::container(&base(), &other);
    refused(bundle(&good).with("--refiner-unet", &other), &["another architecture"]);
    refused(bundle(&good).with("--refiner-unet", base().join("model_index.json")), &["--refiner-unet", "not a container"]);
    refused(Squeeze::new("bundle").model(base()).with("--refiner-unet", &other), &["required arguments"]);
    // A refiner's sampler can have another prediction than the base's.
    let velocity = changed("velocity", &|model| {
        let path = model.join("scheduler/scheduler_config.json");
        let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        (config["prediction_type"], config["rescale_betas_zero_snr"]) = (json!("v_prediction"), json!(true));
        std::fs::write(&path, config.to_string()).unwrap();
    });
    bundle(&velocity).out(&out).succeeds().says(&["apple-zero-snr: ", "(the refiner)"]);
}
