//! The packages that the writer makes, compared with the UNet, with the container and with
//! coremltools.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use sdxl_squeeze::checkpoint::Weights;
use sdxl_squeeze::container::Container;
use sdxl_squeeze::coreml::proto::mil_spec::argument::binding::Binding;
use sdxl_squeeze::coreml::proto::mil_spec::tensor_value::Value as Content;
use sdxl_squeeze::coreml::proto::mil_spec::value::Value as Kind;
use sdxl_squeeze::coreml::proto::mil_spec::value::immediate_value::Value as Immediate;
use sdxl_squeeze::coreml::proto::mil_spec::{DataType, Value as MilValue};
use sdxl_squeeze::coreml::{Io, Layout, Options, verify, write};
use sdxl_squeeze::device::Placement;
use sdxl_squeeze::model::Unobserved;
use sdxl_squeeze::model::unet::{Conditioning, Unet, UnetChain, UnetConfig};
use sdxl_squeeze::pipeline::{PipelineFolder, UnetWeights};
use sdxl_squeeze::progress::Silent;
use sdxl_squeeze::random::noise;
use serde_json::{Value, json};
use tch::{Device, Kind as Dtype, Tensor};

use super::file::{Package, blob_path, bytes_of, declared, model_path};
use super::interpreter::evaluate;
use super::made_up;
use crate::support::{emoji, ended_with, relative_error, repo, squeeze};

/// Compares the output of a package with that of the UNet in Rust, on the same random inputs.
fn compare(package: &Path, chain: &UnetChain, unet: &Unet, options: &Options) {
    let mut package = Package::read(package);
    let inputs = random_inputs(&mut package);
    let expected = prediction(chain, unet, options, &inputs);
    let outputs = evaluate(&mut package, &inputs);
    let error = relative_error(&outputs["noise_pred"], &expected);
    assert!(error < 1e-4, "{options:?}: {error}");
}

/// Random inputs for a package of a whole UNet.
pub(super) fn random_inputs(package: &mut Package) -> BTreeMap<String, Tensor> {
    let function = package.program().functions["main"].clone();
    let mut inputs: BTreeMap<String, Tensor> = BTreeMap::new();
    for (seed, input) in (7..).zip(&function.inputs) {
        let (_, shape) = declared(input.r#type.as_ref());
        let x = match input.name.as_str() {
            "timestep" => Tensor::full(&shape, 741.0, (Dtype::Float, Device::Cpu)),
            "time_ids" => Tensor::full(&shape, 512.0, (Dtype::Float, Device::Cpu)),
            _ => noise(&shape, seed, Dtype::Float).unwrap(),
        };
        inputs.insert(input.name.clone(), x);
    }
    inputs
}

/// The prediction of the UNet in Rust for the inputs of its package.
pub(super) fn prediction(chain: &UnetChain, unet: &Unet, options: &Options, inputs: &BTreeMap<String, Tensor>) -> Tensor {
    let text = &inputs["encoder_hidden_states"];
    let text = if options.io == Io::Apple { text.squeeze_dim(2).transpose(1, 2) } else { text.shallow_clone() };
    assert_eq!(text.size(), [options.batch, options.tokens, chain.config().cross_attention_dim]);
    let conditioning = Conditioning {
        encoder_hidden_states: text,
        text_embeds: inputs["text_embeds"].shallow_clone(),
        time_ids: inputs["time_ids"].shallow_clone(),
        timestep_cond: inputs.get("timestep_cond").map(Tensor::shallow_clone),
    };
    unet.forward(&inputs["sample"], 741.0, &conditioning, &mut Unobserved).unwrap()
}

/// The dense weights of a pipeline.
pub(super) fn dense<'a>(pipeline: &'a PipelineFolder, weights: &'a Weights) -> UnetWeights<'a> {
    UnetWeights::Dense { weights, config: pipeline.unet_config(), prediction_type: Some(pipeline.scheduler.prediction()) }
}

#[test]
fn the_program_computes_what_the_unet_computes() {
    let folder = tempfile::tempdir().unwrap();
    for (i, model) in ["base-like", "refiner-like", "v-prediction"].into_iter().enumerate() {
        let model = repo(&format!("tests/golden/{model}"));
        let path = folder.path().join(format!("{i}.safetensors"));
        made_up::container(&model, &path);
        let container = Container::open(&path).unwrap();
        let chain = UnetWeights::from(&container).chain().unwrap();
        let unet = Unet::resident(chain.clone(), UnetWeights::from(&container).source(Placement::CPU), &Silent).unwrap();
        for (n, (layout, io, batch)) in [
            (Layout::Linear, Io::Diffusers, 2),
            (Layout::Linear, Io::Apple, 1),
            (Layout::SplitEinsum, Io::Diffusers, 1),
            (Layout::SplitEinsum, Io::Apple, 2),
        ]
        .into_iter()
        .enumerate()
        .skip(i)
        .step_by(i + 1)
        {
            let options = Options { layout, io, batch, latents: [16, 8], tokens: 9 + n as i64, ..Options::new(chain.config()) };
            let out = folder.path().join(format!("{i}-{n}.mlpackage"));
            let written = write(UnetWeights::Container(&container), &options, &out, &Silent).unwrap();
            let found = verify(&out).unwrap();
            assert_eq!((found.hashed, found.named, found.compressed), (true, true, written.compressed));
            assert_eq!((found.bytes, found.weight_bytes), (written.bytes, written.weight_bytes));
            assert_eq!((found.operations, found.compressed), (written.operations, container.layers().len()));
            compare(&out, &chain, &unet, &options);
        }
    }
}

#[test]
fn the_bundled_models_dense_weights() {
    let folder = tempfile::tempdir().unwrap();
    let pipeline = PipelineFolder::open(&emoji()).unwrap();
    let weights = pipeline.unet_weights().unwrap();
    let out = folder.path().join("dense.mlpackage");
    let options = Options::new(pipeline.unet.config());
    assert_eq!((options.latents, options.time_ids), ([16, 16], 6));
    let written = write(dense(&pipeline, &weights), &options, &out, &Silent).unwrap();
    assert_eq!((written.compressed, verify(&out).unwrap().compressed), (0, 0));
    let unet = Unet::resident(pipeline.unet.clone(), weights.source(Placement::CPU), &Silent).unwrap();
    compare(&out, &pipeline.unet, &unet, &options);
}

/// Settings that a config may have and SDXL's configs do not: other sinusoidal embeddings, also of
/// odd widths, and convolutions that pad only at the end.
#[test]
fn unusual_architectures_become_programs_that_equal_the_unet() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model");
    crate::support::copy(&repo("tests/golden/base-like"), &model);
    let path = model.join("unet/config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    for (key, value) in [
        ("flip_sin_to_cos", json!(false)),
        ("freq_shift", json!(1)),
        ("downsample_padding", json!(0)),
        ("center_input_sample", json!(true)),
        ("addition_time_embed_dim", json!(5)),
    ] {
        config[key] = value;
    }
    std::fs::write(&path, config.to_string()).unwrap();
    let entries = config.as_object().unwrap().clone();
    let chain = UnetChain::new(UnetConfig::read(&path).unwrap());
    let weights = Weights::open(&model.join("unet"), "diffusion_pytorch_model", str::to_owned).unwrap();
    let unet = Unet::resident(chain.clone(), weights.source(Placement::CPU), &Silent).unwrap();
    for (name, layout) in [("a.mlpackage", Layout::Linear), ("b.mlpackage", Layout::SplitEinsum)] {
        let options = Options { layout, latents: [8, 16], tokens: 5, ..Options::new(chain.config()) };
        let out = folder.path().join(name);
        write(UnetWeights::Dense { weights: &weights, config: &entries, prediction_type: None }, &options, &out, &Silent)
            .unwrap();
        assert!(verify(&out).unwrap().named);
        compare(&out, &chain, &unet, &options);
    }
}

/// Mid blocks without attention or none, depths in lists, more channels in, the guidance scale as
/// an input.
#[test]
fn programs_of_every_architecture_equal_the_unet() {
    let folder = tempfile::tempdir().unwrap();
    for name in crate::architectures::NAMES {
        let path = crate::architectures::golden(name).join("unet");
        let config: Value = serde_json::from_slice(&std::fs::read(path.join("config.json")).unwrap()).unwrap();
        let entries = config.as_object().unwrap().clone();
        let chain = UnetChain::new(UnetConfig::read(&path.join("config.json")).unwrap());
        let weights = Weights::open(&path, "diffusion_pytorch_model", str::to_owned).unwrap();
        let unet = Unet::resident(chain.clone(), weights.source(Placement::CPU), &Silent).unwrap();
        for layout in [Layout::Linear, Layout::SplitEinsum] {
            let options = Options { layout, latents: [8, 16], tokens: 5, ..Options::new(chain.config()) };
            let out = folder.path().join(format!("{name}-{layout}.mlpackage"));
            write(UnetWeights::Dense { weights: &weights, config: &entries, prediction_type: None }, &options, &out, &Silent)
                .unwrap();
            assert!(verify(&out).unwrap().named);
            compare(&out, &chain, &unet, &options);
            let apple = Options { io: Io::Apple, ..options };
            let out = folder.path().join(format!("{name}-{layout}-apple.mlpackage"));
            let written =
                write(UnetWeights::Dense { weights: &weights, config: &entries, prediction_type: None }, &apple, &out, &Silent);
            assert_eq!(written.is_ok(), ["ssd-like", "koala-like"].contains(&name), "{name}");
        }
    }
}

/// Masks, indices and palettes in the package equal those in the container. Both remain in
/// target/tmp, for `check_coreml.py`.
#[test]
fn compressed_weights_keep_their_bits() {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("coreml");
    std::fs::remove_dir_all(&folder).ok();
    std::fs::create_dir_all(&folder).unwrap();
    let path = folder.join("c.safetensors");
    made_up::container(&repo("tests/golden/base-like"), &path);
    let container = Container::open(&path).unwrap();
    let chain = UnetWeights::from(&container).chain().unwrap();
    let out = folder.join("c.mlpackage");
    let options = Options { latents: [8, 8], ..Options::new(chain.config()) };
    write(UnetWeights::Container(&container), &options, &out, &Silent).unwrap();
    let mut package = Package::read(&out);
    let blobs = package.blobs.clone();
    let mut compared = 0;
    for layer in container.layers() {
        let weight = container.weight(&layer.name).unwrap();
        let name = layer.name.replace('.', "_");
        if let Some(mask) = weight.mask.as_ref().filter(|mask| mask.kept() > 0) {
            let kind =
                if layer.bits.is_some() { (format!("{name}_palettized_0"), "indices_mask") } else { (name.clone(), "mask") };
            assert_eq!(bytes(&mut package, &kind.0, kind.1, &blobs), mask.bytes(), "{name}");
            compared += 1;
        }
        if let (sdxl_squeeze::container::Values::Palettized { indices, .. }, true) = (&weight.values, weight.kept() > 0) {
            let kind = if weight.mask.is_some() {
                (format!("{name}_palettized_0"), "indices_nonzero_data")
            } else {
                (name.clone(), "indices")
            };
            assert_eq!(bytes(&mut package, &kind.0, kind.1, &blobs), indices.bytes(), "{name}");
            compared += 1;
        }
    }
    assert!(compared > 300, "{compared}");
}

/// The bytes of an operation's inline parameter.
fn bytes(package: &mut Package, output: &str, parameter: &str, blobs: &[u8]) -> Vec<u8> {
    let op = package.named(output);
    let Some(Binding::Value(value)) = &op.inputs[parameter].arguments[0].binding else { panic!("{output}: not inline") };
    bytes_of(value, blobs)
}

#[test]
fn the_same_input_gives_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let model = repo("tests/golden/base-like");
    let pipeline = PipelineFolder::open(&model).unwrap();
    let weights = pipeline.unet_weights().unwrap();
    let options = Options::new(pipeline.unet.config());
    let write = |name: &str, options: &Options| {
        let out = folder.path().join(name);
        write(dense(&pipeline, &weights), options, &out, &Silent).unwrap();
        let content = |path| std::fs::read(path).unwrap();
        [content(out.join("Manifest.json")), content(model_path(&out)), content(blob_path(&out))]
    };
    let first = write("a.mlpackage", &options);
    assert_eq!(first, write("b.mlpackage", &options));
    assert_ne!(first[0], write("c.mlpackage", &Options { license: "MIT".into(), ..options })[0]);
}

/// The parameters of every operation have dtypes, ranks and kinds of arguments that coremltools
/// itself writes.
#[test]
fn operations_are_serialized_as_by_coremltools() {
    let golden = repo("tests/golden/coreml/operations.json");
    let golden: BTreeMap<String, BTreeSet<String>> = serde_json::from_slice(&std::fs::read(golden).unwrap()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("c.safetensors");
    made_up::container(&repo("tests/golden/base-like"), &path);
    let container = Container::open(&path).unwrap();
    let chain = UnetWeights::from(&container).chain().unwrap();
    let mut seen = BTreeSet::new();
    for (name, layout) in [("linear", Layout::Linear), ("split", Layout::SplitEinsum)] {
        let out = folder.path().join(format!("{name}.mlpackage"));
        let options = Options { layout, ..Options::new(chain.config()) };
        write(UnetWeights::Container(&container), &options, &out, &Silent).unwrap();
        seen.extend(known_operations(&mut Package::read(&out), &golden));
    }
    seen.remove("const");
    assert!(golden.keys().all(|kind| seen.contains(kind)), "{seen:?}");
}

/// The kinds of a package's operations, whose parameters must have dtypes, ranks and kinds of
/// arguments that `golden` has.
pub(super) fn known_operations(package: &mut Package, golden: &BTreeMap<String, BTreeSet<String>>) -> BTreeSet<String> {
    let mut seen = BTreeSet::new();
    let mut known: BTreeMap<String, String> = BTreeMap::new();
    for input in &package.program().functions["main"].inputs {
        known.insert(input.name.clone(), format!("var {}", describe(declared(input.r#type.as_ref()))));
    }
    for op in &package.block().operations {
        for output in &op.outputs {
            let mut what = format!("var {}", describe(declared(output.r#type.as_ref())));
            if op.r#type == "const" {
                what = format!("const{}{}", &what[3..], text(&op.attributes["val"]));
            }
            known.insert(output.name.clone(), what);
        }
        for (parameter, argument) in &op.inputs {
            for binding in &argument.arguments {
                let what = match binding.binding.as_ref().unwrap() {
                    // The golden file describes the weights of dense and of compressed networks
                    // together, as `var/const`.
                    Binding::Name(name) if parameter == "weight" => {
                        format!("var/const {}", known[name].split_once(' ').unwrap().1)
                    }
                    Binding::Name(name) => known[name].clone(),
                    // The golden file has indices of 4 bits only, so other widths are replaced
                    // by 4 bits below.
                    Binding::Value(value) => format!("inline {}", describe(declared(value.r#type.as_ref()))),
                };
                let mut pattern = format!("{parameter} {what}");
                for bits in [2, 3, 6, 8] {
                    pattern = pattern.replace(&format!("inline UINT{bits} "), "inline UINT4 ");
                }
                if parameter.starts_with("indices") && parameter != "indices_mask" {
                    pattern = pattern.replace("inline UINT1 ", "inline UINT4 ");
                }
                assert!(golden[&op.r#type].contains(&pattern), "{}: {pattern}", op.r#type);
            }
        }
        seen.insert(op.r#type.clone());
    }
    seen
}

fn describe((code, shape): (i32, Vec<i64>)) -> String {
    format!("{} {}", DataType::try_from(code).unwrap().as_str_name(), shape.len())
}

/// A string constant's text, with a space before it.
fn text(value: &MilValue) -> String {
    let Some(Kind::ImmediateValue(value)) = &value.value else { return String::new() };
    let Some(Immediate::Tensor(tensor)) = &value.value else { return String::new() };
    match &tensor.value {
        Some(Content::Strings(list)) => format!(" {}", list.values[0]),
        _ => String::new(),
    }
}

#[test]
fn what_cannot_be_written_is_refused_and_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let pipeline = PipelineFolder::open(&emoji()).unwrap();
    let weights = pipeline.unet_weights().unwrap();
    let options = Options::new(pipeline.unet.config());
    let out = folder.path().join("x.mlpackage");
    let try_write =
        |options: &Options, out: &Path| write(dense(&pipeline, &weights), options, out, &Silent).unwrap_err().to_string();
    for (expected, options) in [
        ("the size of the latents is 18; it must be a multiple of 4", Options { latents: [16, 18], ..options.clone() }),
        ("the size of the latents is 0", Options { latents: [0, 16], ..options.clone() }),
        ("pictures in a batch is 0", Options { batch: 0, ..options.clone() }),
        ("pictures in a batch is 1000000", Options { batch: 1_000_000, ..options.clone() }),
        ("number of tokens is -1", Options { tokens: -1, ..options.clone() }),
        ("9 time ids leave nothing", Options { time_ids: 9, ..options.clone() }),
    ] {
        let said = try_write(&options, &out);
        assert!(said.contains(expected), "{said}");
    }
    assert!(try_write(&options, &folder.path().join("x")).contains(".mlpackage"));
    std::fs::create_dir(&out).unwrap();
    std::fs::write(out.join("a"), "a").unwrap();
    assert!(try_write(&options, &out).contains("is there already"));
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);

    // A weight exceeds the range of fp16.
    let model = folder.path().join("model");
    crate::support::copy(&repo("tests/golden/base-like"), &model);
    let path = model.join("unet/diffusion_pytorch_model.safetensors");
    let mut tensors = Tensor::read_safetensors(&path).unwrap();
    tensors[3].1 = tensors[3].1.to_kind(Dtype::Float) * 0.0 + 1e6;
    Tensor::write_safetensors(&tensors, &path).unwrap();
    let pipeline = PipelineFolder::open(&model).unwrap();
    let weights = pipeline.unet_weights().unwrap();
    let out = folder.path().join("y.mlpackage");
    let failed = write(dense(&pipeline, &weights), &Options::new(pipeline.unet.config()), &out, &Silent);
    assert!(failed.unwrap_err().to_string().contains(&tensors[3].0));
    assert!(!out.exists());
}

#[test]
fn export_and_verify_say_what_a_package_has() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    made_up::container(&repo("tests/golden/refiner-like"), Path::new(&path("c.safetensors")));
    let export = |out: &str, more: &[&str]| {
        let (container, out) = (path("c.safetensors"), path(out));
        squeeze(&[&["export", &container, "--to", "coreml", "--out", &out], more].concat())
    };
    let said = ended_with(0, &export("a.mlpackage", &["--height", "128", "--width", "64", "--batch", "1", "--author", "Ada"]));
    assert!(said.contains("compressed weights") && said.contains("needs iOS 18.2 or macOS 15.2: "), "{said}");
    let said = ended_with(0, &squeeze(&["verify", &path("a.mlpackage")]));
    assert!(said.contains("every hash holds") && said.contains("sample: fp16 [1, 4, 16, 8]"), "{said}");
    assert!(said.contains("time_ids: fp32 [1, 5]") && said.contains("needs iOS 18.2 or macOS 15.2: "), "{said}");
    let metadata = Package::read(Path::new(&path("a.mlpackage"))).model.description.unwrap().metadata.unwrap();
    assert_eq!((metadata.author.as_str(), metadata.user_defined["sdxl-squeeze.recipe"].as_str()), ("Ada", r#"{"made":"up"}"#));

    // With `--model`, the scale of the pipeline's VAE, which is 4, determines the size of the
    // latents.
    let model = repo("tests/golden/refiner-like");
    let model = model.to_str().unwrap();
    let more = ["--model", model, "--height", "64", "--width", "32", "--layout", "split-einsum", "--io", "apple"];
    ended_with(0, &export("b.mlpackage", &more));
    let said = ended_with(0, &squeeze(&["verify", &path("b.mlpackage"), "--json"]));
    assert!(said.contains("sample: fp16 [2, 4, 16, 8]") && said.contains("encoder_hidden_states: fp16 [2, 24, 1, 77]"), "{said}");

    let said = ended_with(2, &export("c.mlpackage", &["--height", "100"]));
    assert!(said.contains("height 100 is not a multiple of 8"), "{said}");
    let said = ended_with(2, &export("c.mlpackage", &["--model", repo("tests/golden/base-like").to_str().unwrap()]));
    assert!(said.contains("another architecture"), "{said}");
    assert!(!Path::new(&path("c.mlpackage")).exists());

    let said = ended_with(0, &squeeze(&["export", model, "--to", "coreml", "--out", &path("dense.mlpackage")]));
    assert!(said.contains("0 compressed weights") && !said.contains("needs iOS"), "{said}");
    // What a package with vectors needs is in it, and nothing is said of other packages.
    assert_eq!(metadata.user_defined["sdxl-squeeze.needs"], "iOS 18.2 or macOS 15.2");
    assert!(metadata.short_description.ends_with("; needs iOS 18.2 or macOS 15.2"), "{}", metadata.short_description);
    let metadata = Package::read(Path::new(&path("dense.mlpackage"))).model.description.unwrap().metadata.unwrap();
    assert!(!metadata.user_defined.contains_key("sdxl-squeeze.needs") && !metadata.short_description.contains("needs"));
}

/// Every byte of the arrays is counted, and a compressed layer has no dense constant beside it.
#[test]
fn no_compressed_weight_is_dense_in_a_package() {
    let folder = tempfile::tempdir().unwrap();
    let (path, out) = (folder.path().join("c.safetensors"), folder.path().join("c.mlpackage"));
    made_up::container(&emoji(), &path);
    let container = Container::open(&path).unwrap();
    let chain = UnetWeights::from(&container).chain().unwrap();
    let written = write(UnetWeights::Container(&container), &Options::new(chain.config()), &out, &Silent).unwrap();
    let mut package = Package::read(&out);
    let operations = &package.block().operations;
    let kinds: BTreeMap<&str, &str> = operations.iter().map(|op| (op.outputs[0].name.as_str(), op.r#type.as_str())).collect();
    let compressed: BTreeSet<String> = container.layers().map(|layer| layer.name.replace('.', "_")).collect();
    assert_eq!(written.compressed, compressed.len());
    for name in &compressed {
        assert!(["constexpr_lut_to_dense", "constexpr_sparse_to_dense"].contains(&kinds[name.as_str()]), "{name}");
    }
    // Constants of halves, by their declared types.
    let halves = operations.iter().filter(|op| op.r#type == "const").filter_map(|op| {
        let (dtype, shape) = declared(op.outputs[0].r#type.as_ref());
        let bytes = 2 * shape.iter().product::<i64>() as u64;
        (dtype == DataType::Float16 as i32).then(|| (op.outputs[0].name.clone(), bytes))
    });
    let mut large: Vec<(String, u64)> = halves.filter(|(_, bytes)| *bytes >= 16 << 10).collect();
    large.sort_by(|a, b| b.1.cmp(&a.1).then_with(|| a.0.cmp(&b.0)));
    let reported: Vec<(String, u64)> = written.dense.iter().map(|dense| (dense.name.clone(), dense.bytes)).collect();
    assert_eq!(reported, large);
    assert!(!reported.is_empty() && reported.iter().all(|(name, _)| !compressed.contains(name)), "{reported:?}");
    // Padding and the marks of records are all that `weight.bin` has besides.
    let counted: u64 = written.constant_bytes.values().sum();
    let expected: u64 = container.layers().map(|layer| layer.bytes).sum();
    assert!(written.constant_bytes["constexpr_lut_to_dense"] > 0 && counted > expected);
    let records = verify(&out).unwrap().blobs as u64;
    assert!(written.weight_bytes <= counted + 64 + 128 * records, "{counted} of {} bytes", written.weight_bytes);
}

/// Apple's Swift samplers take every output for noise.
#[test]
fn apples_inputs_with_another_prediction_are_a_warning() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let export = |model: &Path, out: &str, more: &[&str]| {
        let flags = ["export", model.to_str().unwrap(), "--to", "coreml", "--out", &path(out)];
        ended_with(0, &squeeze(&[&flags[..], more].concat()))
    };
    let (noise, v) = (repo("tests/golden/base-like"), repo("tests/golden/v-prediction"));
    let said = export(&v, "v.mlpackage", &["--io", "apple"]);
    assert!(said.contains("apple-scheduler: the model predicts `v_prediction`, not noise"), "{said}");
    let said = export(&v, "w.mlpackage", &["--io", "apple", "--json", "--quiet"]);
    let report: Value = serde_json::from_str(&said[said.find('{').unwrap()..=said.rfind('}').unwrap()]).unwrap();
    assert!(report["warnings"][0].as_str().unwrap().starts_with("apple-scheduler: "));
    assert!(report["constant_bytes"]["const"].as_u64().unwrap() > 0);
    for (out, more) in [("x.mlpackage", &["--io", "apple"][..]), ("y.mlpackage", &["--io", "diffusers"])] {
        let model = if out.starts_with('x') { &noise } else { &v };
        assert!(!export(model, out, more).contains("apple-scheduler"));
    }
    // A container of an older program does not say what its UNet predicts.
    let container = path("c.safetensors");
    made_up::container(&noise, Path::new(&container));
    let said = export(Path::new(&container), "z.mlpackage", &["--io", "apple"]);
    assert!(said.contains("apple-scheduler: the container does not record what its UNet predicts"), "{said}");
    let said = export(Path::new(&container), "zz.mlpackage", &["--io", "apple", "--model", noise.to_str().unwrap()]);
    assert!(!said.contains("apple-scheduler"), "{said}");
    // EDM's preconditioning, and models that predict the picture.
    let model = folder.path().join("model");
    for (class, prediction, words) in [
        ("EDMEulerScheduler", "epsilon", "is sampled by EDMEulerScheduler"),
        ("EulerDiscreteScheduler", "sample", "predicts `sample`, not noise"),
    ] {
        std::fs::remove_dir_all(&model).ok();
        crate::support::copy(&noise, &model);
        let config = json!({ "_class_name": class, "prediction_type": prediction });
        std::fs::write(model.join("scheduler/scheduler_config.json"), config.to_string()).unwrap();
        let index = std::fs::read_to_string(model.join("model_index.json")).unwrap();
        std::fs::write(model.join("model_index.json"), index.replace("EulerDiscreteScheduler", class)).unwrap();
        let said = export(&model, &format!("{class}.mlpackage"), &["--io", "apple"]);
        assert!(said.contains(words), "{said}");
    }
}

/// The check also accepts a package that this project's writer did not make.
#[test]
fn a_package_by_coremltools_is_whole() {
    let found = verify(&repo("tests/golden/coreml/by-coremltools.mlpackage")).unwrap();
    assert_eq!((found.compressed, found.blobs, found.hashed, found.named), (6, 20, false, false));
    assert_eq!(found.outputs, ["noise_pred: fp32 [2, 16, 8, 8]"]);
    let found = verify(&repo("tests/golden/coreml/vectors-by-coremltools.mlpackage")).unwrap();
    assert_eq!((found.compressed, found.vectors, found.hashed, found.named), (8, 8, false, false));
    // Half of them are masked: 40 % and 30 % of their vectors.
    assert_eq!(found.compressed_elements, 4 * (16 * 16 * 9 + 16 * 16));
    assert!((0.15..0.2).contains(&(found.pruned as f64 / found.compressed_elements as f64)), "{}", found.pruned);
}
