//! Packages of text encoders and of the VAE's halves, compared with the networks in Rust.
//!
//! `tests/golden/check_coreml_parts.py` compares them with transformers and diffusers.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use sdxl_squeeze::Result;
use sdxl_squeeze::checkpoint::TensorSource;
use sdxl_squeeze::coreml::{Label, WrittenPackage, verify};
use sdxl_squeeze::device::Placement;
use sdxl_squeeze::export::{PipelinePart, coreml_part};
use sdxl_squeeze::model::text::ClipText;
use sdxl_squeeze::model::vae::{VaeDecoder, VaeEncoder};
use sdxl_squeeze::pipeline::{ModelFiles, PipelineFolder};
use sdxl_squeeze::progress::Silent;
use sdxl_squeeze::random::noise;
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

use super::file::{Package, blob_path, declared, model_path};
use super::interpreter::evaluate;
use super::write::known_operations;
use crate::squeeze::Squeeze;
use crate::support::{copy, emoji, relative_error, repo};

/// Weights as a package has them: rounded to fp16.
struct Rounded<T>(T);

impl<T: TensorSource> TensorSource for Rounded<T> {
    fn tensor(&self, name: &str, shape: &[i64]) -> Result<Tensor> {
        Ok(self.0.tensor(name, shape)?.f_to_kind(Kind::Half)?.f_to_kind(Kind::Float)?)
    }
}

/// The pipelines whose parts are written: both conventions for the end of a text, both activations,
/// encoders with and without a projection; VAEs in fp32 and in fp16, with and without attention.
pub(super) fn models() -> [PathBuf; 4] {
    [emoji(), repo("tests/golden/base-like"), repo("tests/golden/refiner-like"), repo("tests/golden/v-prediction")]
}

pub(super) fn write_part(model: &Path, part: PipelinePart, latents: [i64; 2], out: &Path) -> WrittenPackage {
    let pipeline = PipelineFolder::open(model).unwrap();
    coreml_part(&pipeline, part, latents, &Label::default(), out, &Silent).unwrap()
}

/// The outputs of the package `out` for one input.
pub(super) fn run(out: &Path, input: &str, x: &Tensor) -> BTreeMap<String, Tensor> {
    evaluate(&mut Package::read(out), &BTreeMap::from([(input.to_owned(), x.shallow_clone())]))
}

#[test]
fn programs_of_text_encoders_equal_the_encoders() {
    let folder = tempfile::tempdir().unwrap();
    let mut ends = BTreeSet::new();
    for (number, model) in models().iter().enumerate() {
        let pipeline = PipelineFolder::open(model).unwrap();
        for part in &pipeline.text_encoders {
            let kind = if part.encoder == "text_encoder" { PipelinePart::TextEncoder } else { PipelinePart::TextEncoder2 };
            let out = folder.path().join(format!("{number}-{kind}.mlpackage"));
            write_part(model, kind, [8, 8], &out);
            let found = verify(&out).unwrap();
            assert!(found.hashed && found.named);
            assert_eq!(found.inputs, [format!("input_ids: fp32 [1, {}]", part.config.max_position_embeddings)]);
            let weights = pipeline.text_weights(part).unwrap();
            let encoder = ClipText::load(&part.config, &Rounded(weights.source(Placement::CPU))).unwrap();
            let tokenizer = pipeline.tokenizer(part).unwrap();
            for text in ["", "a cat", "an emoji of a red apple in a bowl, oil on canvas, very detailed, best quality"] {
                let ids = Tensor::from_slice(&tokenizer.encode(text).unwrap().ids).unsqueeze(0);
                let expected = encoder.forward(&ids).unwrap();
                let made = run(&out, "input_ids", &ids);
                let error = relative_error(&made["hidden_embeds"], &expected.penultimate);
                assert!(error < 1e-4, "{} {kind} {text}: {error}", model.display());
                if let Some(pooled) = expected.pooled {
                    let error = relative_error(&made["pooled_outputs"], &pooled);
                    assert!(error < 1e-4, "{} {kind} {text}, pooled: {error}", model.display());
                    ends.insert(format!("{:?}", part.config.end_of_text).split('(').next().unwrap().to_owned());
                }
            }
        }
    }
    assert_eq!(ends.into_iter().collect::<Vec<_>>(), ["HighestId", "Token"]);
}

/// What transformers calls `pooler_output`: the normed state at the end of the text.
#[test]
fn pooled_text_without_a_projection_is_that_of_the_identity() {
    let folder = tempfile::tempdir().unwrap();
    let (model, plain, projecting) =
        (folder.path().join("model"), folder.path().join("a.mlpackage"), folder.path().join("b.mlpackage"));
    copy(&emoji(), &model);
    write_part(&model, PipelinePart::TextEncoder, [16, 16], &plain);
    let config_path = model.join("text_encoder/config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&config_path).unwrap()).unwrap();
    config["architectures"] = json!(["CLIPTextModelWithProjection"]);
    std::fs::write(&config_path, config.to_string()).unwrap();
    let path = model.join("text_encoder/model.safetensors");
    let mut tensors = Tensor::read_safetensors(&path).unwrap();
    tensors.push(("text_projection.weight".into(), Tensor::eye(64, (Kind::Half, Device::Cpu))));
    Tensor::write_safetensors(&tensors, &path).unwrap();
    write_part(&model, PipelinePart::TextEncoder, [16, 16], &projecting);
    // Begin, two tokens, end, padding.
    let ids = Tensor::from_slice(&[3512i64, 20, 30, 3513]).constant_pad_nd([0, 73]).unsqueeze(0);
    let [a, b] = [&plain, &projecting].map(|out| run(out, "input_ids", &ids).remove("pooled_outputs").unwrap());
    assert!(relative_error(&a, &b) < 1e-6 && a.abs().sum(None::<Kind>).double_value(&[]) > 1.0);
}

#[test]
fn programs_of_vaes_equal_the_vaes() {
    let folder = tempfile::tempdir().unwrap();
    let mut dtypes = BTreeSet::new();
    for (number, model) in models().iter().enumerate() {
        let pipeline = PipelineFolder::open(model).unwrap();
        let weights = pipeline.vae_weights().unwrap();
        let source = Rounded(weights.source(Placement::CPU));
        let latents = [6, 10];
        let pixels = latents.map(|n| n * pipeline.vae.scale());

        let out = folder.path().join(format!("{number}-decoder.mlpackage"));
        write_part(model, PipelinePart::VaeDecoder, latents, &out);
        let found = verify(&out).unwrap();
        assert!(found.hashed && found.named);
        let dtype = if pipeline.vae.force_upcast { "fp32" } else { "fp16" };
        assert_eq!(found.inputs, [format!("z: {dtype} [1, 4, 6, 10]")]);
        assert_eq!(found.outputs, [format!("image: fp32 [1, 3, {}, {}]", pixels[0], pixels[1])]);
        dtypes.insert(dtype);
        let z = noise(&[1, 4, 6, 10], 5, Kind::Float).unwrap();
        let expected = VaeDecoder::load(&pipeline.vae, &source).unwrap().forward(&z).unwrap();
        let error = relative_error(&run(&out, "z", &z)["image"], &expected);
        assert!(error < 1e-4, "{}: {error}", model.display());

        let out = folder.path().join(format!("{number}-encoder.mlpackage"));
        write_part(model, PipelinePart::VaeEncoder, latents, &out);
        let found = verify(&out).unwrap();
        assert_eq!(found.inputs, [format!("x: fp32 [1, 3, {}, {}]", pixels[0], pixels[1])]);
        let x = noise(&[1, 3, pixels[0], pixels[1]], 6, Kind::Float).unwrap().clamp(-1.0, 1.0);
        let expected = VaeEncoder::load(&pipeline.vae, &source).unwrap().forward(&x).unwrap();
        let latent = &run(&out, "x", &x)["latent"];
        assert!(relative_error(&latent.narrow(1, 0, 4), &expected.mean) < 1e-4, "{}", model.display());
        let deviation = (latent.narrow(1, 4, 4).clamp(-30.0, 20.0) * 0.5).exp();
        assert!(relative_error(&deviation, &expected.std) < 1e-4, "{}", model.display());
    }
    assert_eq!(dtypes.into_iter().collect::<Vec<_>>(), ["fp16", "fp32"]);
}

/// A VAE that is computed in fp32 still has its kernels and matrices in fp16.
#[test]
fn weights_of_a_vae_in_fp32_take_two_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("x.mlpackage");
    let written = write_part(&emoji(), PipelinePart::VaeDecoder, [16, 16], &out);
    let tensors = VaeDecoder::tensors(&PipelineFolder::open(&emoji()).unwrap().vae).unwrap();
    let (large, small): (Vec<_>, Vec<_>) = tensors.iter().partition(|tensor| tensor.shape.len() > 1);
    let elements = |specs: &[&sdxl_squeeze::checkpoint::TensorSpec]| {
        specs.iter().map(|spec| spec.shape.iter().product::<i64>() as u64).sum::<u64>()
    };
    assert_eq!(written.constant_bytes["constexpr_cast"], 2 * elements(&large));
    assert!(written.constant_bytes["const"] >= 4 * elements(&small));
    assert!(!written.dense.is_empty());
}

#[test]
fn operations_of_the_parts_are_serialized_as_by_coremltools() {
    let golden = repo("tests/golden/coreml/operations-parts.json");
    let golden: BTreeMap<String, BTreeSet<String>> = serde_json::from_slice(&std::fs::read(golden).unwrap()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let mut seen = BTreeSet::new();
    for (number, model) in models().iter().enumerate() {
        for part in PARTS {
            if number == 2 && part == PipelinePart::TextEncoder {
                continue;
            }
            let out = folder.path().join(format!("{number}-{part}.mlpackage"));
            write_part(model, part, [8, 8], &out);
            seen.extend(known_operations(&mut Package::read(&out), &golden));
        }
    }
    for kind in ["gather", "reduce_max", "reduce_argmax", "equal", "sigmoid", "gelu", "constexpr_cast"] {
        assert!(seen.contains(kind), "{kind}");
    }
}

pub(super) const PARTS: [PipelinePart; 4] =
    [PipelinePart::TextEncoder, PipelinePart::TextEncoder2, PipelinePart::VaeDecoder, PipelinePart::VaeEncoder];

#[test]
fn the_same_part_gives_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    for part in PARTS {
        let [a, b] = ["a", "b"].map(|name| {
            let out = folder.path().join(format!("{part}-{name}.mlpackage"));
            write_part(&emoji(), part, [16, 16], &out);
            [model_path(&out), blob_path(&out), out.join("Manifest.json")].map(|path| std::fs::read(path).unwrap())
        });
        assert!(a == b, "{part}");
    }
}

#[test]
fn export_writes_parts_and_refuses_what_has_no_effect() {
    let folder = tempfile::tempdir().unwrap();
    let out = |name: &str| folder.path().join(format!("{name}.mlpackage"));
    let export = |part: &str| Squeeze::new("export").arg(emoji()).args(["--to", "coreml", "--part", part]);
    export("text_encoder").out(out("text")).args(["--author", "Ada", "--license", "MIT"]).succeeds();
    let metadata = Package::read(&out("text")).model.description.unwrap().metadata.unwrap();
    assert_eq!((metadata.author.as_str(), metadata.license.as_str()), ("Ada", "MIT"));
    assert!(metadata.short_description.starts_with("A text encoder"));
    export("vae_decoder").out(out("vae")).args(["--height", "32", "--width", "128"]).succeeds();
    Squeeze::new("verify").arg(out("vae")).succeeds().says(&["in  z: fp32 [1, 4, 8, 32]", "out image: fp32 [1, 3, 32, 128]"]);
    export("unet").out(out("unet")).succeeds();
    let inputs = &Package::read(&out("unet")).program().functions["main"].inputs.clone();
    assert_eq!(declared(inputs[0].r#type.as_ref()).1, [2, 4, 16, 16]);

    let refused = |run: Squeeze, parts: &[&str]| {
        run.out(out("none")).is_refused(parts);
        assert!(!out("none").exists());
    };
    refused(export("text_encoder").args(["--height", "64"]), &["--height has no effect with --part text_encoder"]);
    refused(export("vae_encoder").args(["--io", "apple"]), &["--io has no effect with --part vae_encoder"]);
    refused(export("vae_decoder").args(["--layout", "linear"]), &["--layout has no effect"]);
    refused(export("vae_decoder").args(["--height", "65"]), &["height 65 is not a multiple of 4"]);
    refused(export("vae_decoder").args(["--height", "65536"]), &["the size of the latents"]);
    refused(export("vae_decoder").model(emoji()), &["--model", "has no effect"]);
    let refiner =
        Squeeze::new("export").arg(repo("tests/golden/refiner-like")).args(["--to", "coreml", "--part", "text_encoder"]);
    refused(refiner, &["has no text_encoder"]);
    let container = repo("tests/golden/container/unet.squeezed.safetensors");
    let of_container = Squeeze::new("export").arg(container).args(["--to", "coreml", "--part", "vae_decoder"]);
    refused(of_container, &["is a container; name the pipeline in its place, and a container of the vae_decoder"]);
    refused(
        Squeeze::new("export").arg(emoji()).args(["--to", "diffusers", "--part", "unet"]),
        &["--part has no effect with this --to"],
    );

    // A weight that fp16 does not hold.
    let model = folder.path().join("model");
    copy(&emoji(), &model);
    let path = model.join("vae/diffusion_pytorch_model.safetensors");
    let mut tensors = Tensor::read_safetensors(&path).unwrap();
    let conv = tensors.iter_mut().find(|(name, _)| name == "decoder.conv_in.weight").unwrap();
    conv.1 = conv.1.to_kind(Kind::Float) * 0.0 + 1e6;
    Tensor::write_safetensors(&tensors, &path).unwrap();
    let run = Squeeze::new("export").arg(&model).args(["--to", "coreml", "--part", "vae_decoder"]);
    refused(run, &["decoder.conv_in.weight"]);
}

/// Where a VAE does not ask for fp32, its program computes in fp16: the fp16-fix VAE.
#[test]
fn force_upcast_decides_the_dtype() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model");
    copy(&emoji(), &model);
    let path = model.join("vae/config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    for (value, dtype) in
        [(json!(true), "fp32"), (json!(1.0), "fp32"), (Value::Null, "fp32"), (json!(false), "fp16"), (json!(0), "fp16")]
    {
        config["force_upcast"] = value.clone();
        std::fs::write(&path, config.to_string()).unwrap();
        let out = folder.path().join(format!("{value}.mlpackage"));
        write_part(&model, PipelinePart::VaeDecoder, [8, 8], &out);
        assert_eq!(verify(&out).unwrap().inputs, [format!("z: {dtype} [1, 4, 8, 8]")], "{value}");
    }
    config["force_upcast"] = json!("yes");
    std::fs::write(&path, config.to_string()).unwrap();
    let run = Squeeze::new("export").arg(&model).args(["--to", "coreml", "--part", "vae_decoder"]);
    run.out(folder.path().join("x.mlpackage")).is_refused(&["force_upcast", "neither true nor false"]);
}

/// Compressed networks stay compressed in their packages, whether they compute in fp16 or fp32.
#[test]
fn programs_of_compressed_networks_equal_the_decoded_networks() {
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("networks.yaml");
    let settings = "nsamples: 2, on_misfit: smaller_group, weight_threshold: 500, global_config: {n_bits: 4, granularity: per_grouped_channel, group_size: 16}";
    let text = format!(
        "solver: sequential\ncalibration: {{prompts: [a cat, two dogs], steps: 1}}\ntext_encoders: {{{settings}}}\nvae: {{{settings}}}\n"
    );
    std::fs::write(&config, text).unwrap();
    let mut elements = BTreeSet::new();
    for (number, model) in models().iter().enumerate() {
        let out = folder.path().join(number.to_string());
        Squeeze::new("compress").config_file(&config).model(model).out(&out).succeeds();
        let at = |name: &str| Some(out.join(format!("{name}.squeezed.safetensors"))).filter(|path| path.exists());
        let files = ModelFiles {
            text_encoder: at("text_encoder"),
            text_encoder_2: at("text_encoder_2"),
            vae: at("vae"),
            ..ModelFiles::of(model)
        };
        let pipeline = PipelineFolder::open_files(&files).unwrap();
        let package = |part: PipelinePart| {
            let out = folder.path().join(format!("{number}-{part}.mlpackage"));
            let written = coreml_part(&pipeline, part, [6, 10], &Label::default(), &out, &Silent).unwrap();
            let found = verify(&out).unwrap();
            assert!(found.hashed && written.compressed > 3 && found.compressed == written.compressed, "{written:?}");
            let own = folder.path().join(format!("{number}-{part}-own.mlpackage"));
            let dense = write_part(model, part, [6, 10], &own);
            assert!(written.weight_bytes < dense.weight_bytes, "{written:?} {dense:?}");
            out
        };
        for part in &pipeline.text_encoders {
            let kind = if part.encoder == "text_encoder" { PipelinePart::TextEncoder } else { PipelinePart::TextEncoder2 };
            let out = package(kind);
            let weights = pipeline.text_network(part).unwrap();
            let encoder = ClipText::load(&part.config, weights.source(Placement::CPU).as_ref()).unwrap();
            let ids = Tensor::from_slice(&pipeline.tokenizer(part).unwrap().encode("a red cat").unwrap().ids).unsqueeze(0);
            let (made, expected) = (run(&out, "input_ids", &ids), encoder.forward(&ids).unwrap());
            let error = relative_error(&made["hidden_embeds"], &expected.penultimate);
            assert!(error < 1e-4, "{} {kind}: {error}", model.display());
        }
        let out = package(PipelinePart::VaeDecoder);
        elements.insert(format!("{:?}", verify(&out).unwrap().inputs).contains("fp32"));
        let weights = pipeline.vae_network().unwrap();
        let z = noise(&[1, 4, 6, 10], 5, Kind::Float).unwrap();
        let expected = VaeDecoder::load(&pipeline.vae, weights.source(Placement::CPU).as_ref()).unwrap().forward(&z).unwrap();
        let error = relative_error(&run(&out, "z", &z)["image"], &expected);
        assert!(error < 1e-4, "{}: {error}", model.display());
    }
    assert_eq!(elements.len(), 2, "a VAE in fp32 and one in fp16");
}
