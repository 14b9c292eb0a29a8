//! A UNet in two packages: the first and then the second compute what the whole computes.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use sdxl_squeeze::checkpoint::{ConfigFile, TensorSource, Weights};
use sdxl_squeeze::codebook::{BitWidth, Codebook};
use sdxl_squeeze::container::{CompressedWeight, Container, ContainerInfo, ContainerWriter, Network};
use sdxl_squeeze::coreml::{Io, Layout, Options, WrittenChunk, verify, write};
use sdxl_squeeze::device::Placement;
use sdxl_squeeze::export::{CHUNKS, coreml_chunks};
use sdxl_squeeze::model::unet::{Unet, UnetChain, UnetConfig};
use sdxl_squeeze::pipeline::{PipelineFolder, UnetWeights};
use sdxl_squeeze::progress::Silent;
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

use super::file::{Package, blob_path, model_path};
use super::interpreter::evaluate;
use super::made_up;
use super::write::{dense, prediction, random_inputs};
use crate::squeeze::Squeeze;
use crate::support::{emoji, relative_error, repo};

/// The paths of the two packages in a folder.
pub(super) fn paths(folder: &Path) -> [PathBuf; 2] {
    CHUNKS.map(|name| folder.join(format!("{name}.mlpackage")))
}

/// The prediction of two packages as Apple's `ManagedMLModel` list computes it: the second is given
/// the inputs of the whole UNet and the outputs of the first, by their names.
pub(super) fn predict(chunks: &[PathBuf; 2], inputs: &BTreeMap<String, Tensor>) -> Tensor {
    let mut packages = chunks.each_ref().map(|path| Package::read(path));
    let given = |package: &mut Package, values: &BTreeMap<String, Tensor>| -> BTreeMap<String, Tensor> {
        let names = package.program().functions["main"].inputs.iter().map(|input| input.name.clone());
        names.map(|name| (name.clone(), values[&name].shallow_clone())).collect()
    };
    let [first, second] = &mut packages;
    let own = given(first, inputs);
    let passed = evaluate(first, &own);
    assert!(passed.keys().all(|name| !inputs.contains_key(name)), "an output would replace an input");
    let all = inputs.iter().chain(&passed).map(|(name, x)| (name.clone(), x.shallow_clone())).collect();
    let own = given(second, &all);
    let made = evaluate(second, &own);
    assert_eq!(made.keys().collect::<Vec<_>>(), ["noise_pred"], "Swift takes the only output");
    made["noise_pred"].shallow_clone()
}

/// The inputs that Swift asks the first package for.
fn check_first_inputs(path: &Path) {
    let inputs: Vec<String> = verify(path).unwrap().inputs;
    for name in ["sample: ", "time_ids: "] {
        assert!(inputs.iter().any(|input| input.starts_with(name)), "{inputs:?}");
    }
}

/// The constants of a package that are tensors of the UNet, and the bytes of their values.
fn stored(path: &Path, names: &BTreeSet<String>) -> BTreeMap<String, Vec<Vec<u8>>> {
    use sdxl_squeeze::coreml::proto::mil_spec::argument::binding::Binding;
    let mut package = Package::read(path);
    let blobs = package.blobs.clone();
    let operations = package.block().operations.clone();
    let mut found: BTreeMap<String, Vec<Vec<u8>>> = BTreeMap::new();
    for op in operations {
        let output = &op.outputs[0].name;
        let name = output.strip_suffix("_palettized_0").unwrap_or(output);
        if !names.contains(name) {
            continue;
        }
        let inline = op.inputs.values().filter_map(|argument| match &argument.arguments[0].binding {
            Some(Binding::Value(value)) => Some(value.clone()),
            _ => None,
        });
        let values = op.attributes.get("val").cloned().into_iter().chain(inline);
        found.entry(name.to_owned()).or_default().extend(values.map(|value| super::file::bytes_of(&value, &blobs)));
    }
    found
}

/// Writes the UNet as one package and as two, and compares them with each other and with the UNet
/// in Rust. Returns the parts of the two.
fn check(folder: &Path, weights: UnetWeights, unet: &Unet, options: &Options) -> [WrittenChunk; 2] {
    let chain = unet.chain();
    let (whole, chunked) = (folder.join("whole.mlpackage"), folder.join("chunks"));
    std::fs::remove_dir_all(&whole).ok();
    std::fs::remove_dir_all(&chunked).ok();
    write(weights, options, &whole, &Silent).unwrap();
    let written = coreml_chunks(weights, options, &chunked, &Silent).unwrap();
    let chunks = paths(&chunked);
    for (path, chunk) in chunks.iter().zip(&written) {
        let found = verify(path).unwrap();
        assert!(found.hashed && found.named, "{options:?}");
        assert_eq!((found.bytes, found.compressed), (chunk.package.bytes, chunk.package.compressed));
    }
    check_first_inputs(&chunks[0]);
    assert_eq!(
        [&written[0].parts[..], &written[1].parts[..]].concat(),
        chain.parts().map(|part| part.to_string()).collect::<Vec<_>>()
    );

    // Every weight is in one of the packages, with the bits that it has in the whole.
    let names: BTreeSet<String> = chain.tensors().unwrap().iter().map(|tensor| tensor.name.replace('.', "_")).collect();
    let [first, second] = chunks.each_ref().map(|path| stored(path, &names));
    assert!(first.keys().all(|name| !second.contains_key(name)));
    let both: BTreeMap<_, _> = first.into_iter().chain(second).collect();
    assert_eq!(both.keys().cloned().collect::<BTreeSet<_>>(), names);
    assert!(both == stored(&whole, &names));

    let mut package = Package::read(&whole);
    let inputs = random_inputs(&mut package);
    let made = predict(&chunks, &inputs);
    assert!(made.equal(&evaluate(&mut package, &inputs)["noise_pred"]), "{options:?}: chunks differ from the whole");
    let error = relative_error(&made, &prediction(chain, unet, options, &inputs));
    assert!(error < 1e-4, "{options:?}: {error}");
    written
}

#[test]
fn chunks_compute_what_the_whole_computes() {
    let folder = tempfile::tempdir().unwrap();
    for (model, kinds) in [
        ("base-like", [(Layout::Linear, Io::Diffusers, 2), (Layout::SplitEinsum, Io::Apple, 2)]),
        ("refiner-like", [(Layout::Linear, Io::Apple, 2), (Layout::SplitEinsum, Io::Diffusers, 1)]),
        ("v-prediction", [(Layout::Linear, Io::Diffusers, 1), (Layout::SplitEinsum, Io::Apple, 2)]),
    ] {
        let path = folder.path().join(format!("{model}.safetensors"));
        made_up::container(&repo(&format!("tests/golden/{model}")), &path);
        let container = Container::open(&path).unwrap();
        let weights = UnetWeights::from(&container);
        let unet = Unet::resident(weights.chain().unwrap(), weights.source(Placement::CPU), &Silent).unwrap();
        for (layout, io, batch) in kinds {
            let options = Options { layout, io, batch, latents: [16, 8], tokens: 9, ..Options::new(unet.chain().config()) };
            check(folder.path(), weights, &unet, &options);
        }
    }
}

/// Mid blocks without attention or none, depths in lists, more channels in, the guidance scale as
/// an input.
#[test]
fn chunks_of_every_architecture() {
    let folder = tempfile::tempdir().unwrap();
    for name in crate::architectures::NAMES {
        let path = crate::architectures::golden(name).join("unet");
        let config: Value = serde_json::from_slice(&std::fs::read(path.join("config.json")).unwrap()).unwrap();
        let entries = config.as_object().unwrap().clone();
        let chain = UnetChain::new(UnetConfig::read(&path.join("config.json")).unwrap());
        let weights = Weights::open(&path, "diffusion_pytorch_model", str::to_owned).unwrap();
        let unet = Unet::resident(chain.clone(), weights.source(Placement::CPU), &Silent).unwrap();
        let weights = UnetWeights::Dense { weights: &weights, config: &entries, prediction_type: None };
        for layout in [Layout::Linear, Layout::SplitEinsum] {
            let options = Options { layout, latents: [8, 16], tokens: 5, ..Options::new(chain.config()) };
            check(folder.path(), weights, &unet, &options);
        }
    }
}

/// A container whose weights in the stages that begin with `heavy` are dense, and have one bit
/// everywhere else.
fn heavy_in(heavy: &str, path: &Path) {
    let model = repo("tests/golden/base-like");
    let pipeline = PipelineFolder::open(&model).unwrap();
    let weights = pipeline.unet_weights().unwrap();
    let source = weights.source(Placement { device: Device::Cpu, kind: Kind::Half });
    let info = ContainerInfo {
        network: Network::Unet,
        config: ConfigFile::read(&model.join("unet/config.json")).unwrap().into_entries(),
        recipe: json!({ "heavy": heavy }),
        sources: Vec::new(),
        prediction_type: None,
    };
    let mut writer = ContainerWriter::create(path, info).unwrap();
    for spec in pipeline.unet.tensors().unwrap() {
        let tensor = source.tensor(&spec.name, &spec.shape).unwrap();
        let values = Vec::<half::f16>::try_from(&tensor.flatten(0, -1)).unwrap();
        if spec.shape.len() < 2 || spec.name.starts_with(heavy) {
            writer.add_tensor(&spec.name, &spec.shape, &values).unwrap();
            continue;
        }
        let palettes = vec![values[0], values[1]];
        let group_size = spec.shape[0] as usize;
        let codebook = Codebook { bits: BitWidth::One, axis: 0, group_size, vector_length: 1, palettes, scales: None };
        let indices: Vec<u8> = (0..values.len()).map(|i| u8::from(i % 3 == 0)).collect();
        let weight = CompressedWeight::palettized(spec.shape.clone(), None, codebook, &indices).unwrap();
        writer.add_weight(&spec.name, &weight, Value::Null).unwrap();
    }
    writer.finish().unwrap();
}

/// The bytes of the weights as they are stored decide the place of the cut. Wherever it is, the
/// skip connections that cross it arrive.
#[test]
fn the_cut_halves_the_stored_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let mut cuts = BTreeSet::new();
    for heavy in ["time_embedding", "down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1"] {
        let path = folder.path().join("c.safetensors");
        std::fs::remove_file(&path).ok();
        heavy_in(heavy, &path);
        let container = Container::open(&path).unwrap();
        let weights = UnetWeights::from(&container);
        let chain = weights.chain().unwrap();
        let unet = Unet::resident(chain.clone(), weights.source(Placement::CPU), &Silent).unwrap();
        let options = Options { latents: [8, 8], tokens: 5, ..Options::new(chain.config()) };
        let written = check(folder.path(), weights, &unet, &options);
        // No other cut comes nearer to half.
        let parts: Vec<String> = chain.parts().map(|part| part.to_string()).collect();
        let bytes = |parts: &[String]| -> u64 {
            let inside = |name: &str| parts.iter().any(|part| part_of(name, part));
            let compressed = container.layers().filter(|layer| inside(&layer.name)).map(|layer| layer.bytes).sum::<u64>();
            compressed + container.tensors().filter(|(name, ..)| inside(name)).map(|(_, _, bytes)| bytes).sum::<u64>()
        };
        let distance = |at: usize| bytes(&parts[..at]).abs_diff(bytes(&parts[at..]));
        let at = written[0].parts.len();
        assert!((1..parts.len()).all(|other| distance(at) <= distance(other)), "{heavy}: {at}");
        cuts.insert(at);
    }
    assert!(cuts.len() >= 3, "{cuts:?}");
}

/// Whether a tensor belongs to a part.
fn part_of(name: &str, part: &str) -> bool {
    let stage = ["down_blocks.", "mid_block.", "up_blocks."].iter().any(|stage| name.starts_with(stage));
    let last = name.starts_with("conv_norm_out.") || name.starts_with("conv_out.");
    match part {
        "head" => !stage && !last,
        "tail" => last,
        stage => name.starts_with(&format!("{stage}.")),
    }
}

#[test]
fn the_same_chunks_have_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let pipeline = PipelineFolder::open(&emoji()).unwrap();
    let weights = pipeline.unet_weights().unwrap();
    let options = Options::new(pipeline.unet.config());
    let [first, second] = ["a", "b"].map(|name| {
        let out = folder.path().join(name);
        coreml_chunks(dense(&pipeline, &weights), &options, &out, &Silent).unwrap();
        paths(&out).map(|path| {
            [path.join("Manifest.json"), model_path(&path), blob_path(&path)].map(|file| std::fs::read(file).unwrap())
        })
    });
    assert!(first == second);
}

/// The bundled model by the command line: what is said, and what is refused.
#[test]
fn export_writes_two_packages_into_a_folder() {
    let folder = tempfile::tempdir().unwrap();
    let (container, out) = (folder.path().join("c.safetensors"), folder.path().join("chunks"));
    made_up::container(&emoji(), &container);
    let export =
        |out: &Path| Squeeze::new("export").arg(&container).args(["--to", "coreml", "--chunks", "2", "--io", "apple"]).out(out);
    let said = export(&out).succeeds().text();
    for part in ["UnetChunk1.mlpackage: ", "UnetChunk2.mlpackage: ", "\nhead, down_blocks.0, ", ", tail\n", "compressed weights"]
    {
        assert!(said.contains(part), "{said}");
    }
    for path in paths(&out) {
        let said = Squeeze::new("verify").arg(&path).succeeds().text();
        assert!(said.contains("every hash holds"), "{said}");
    }
    assert_eq!(std::fs::read_dir(&out).unwrap().count(), 2);
    let second = verify(&paths(&out)[1]).unwrap();
    assert_eq!(second.outputs, ["noise_pred: fp32 [2, 4, 16, 16]"]);
    assert!(second.inputs[0].starts_with("encoder_hidden_states: fp16 [2, 160, 1, 77]"), "{:?}", second.inputs);
    assert!(second.inputs[1..].iter().all(|input| input.contains(": fp32 ")), "{:?}", second.inputs);

    let json = export(&folder.path().join("json")).arg("--json").succeeds().stdout;
    let json: Value = serde_json::from_str(&json).unwrap();
    for (i, name) in CHUNKS.iter().enumerate() {
        let chunk = &json["chunks"][i];
        assert_eq!(chunk["file"], format!("{name}.mlpackage"));
        assert!(chunk["weight_bytes"].as_u64() > Some(0) && chunk["parts"].as_array().unwrap().len() > 1, "{chunk}");
    }

    export(&out).is_refused(&["is there already"]);
    export(&folder.path().join("x.mlpackage")).is_refused(&["written into a folder", "must not end in .mlpackage"]);
    let other = Squeeze::new("export").arg(emoji()).args(["--to", "coreml", "--part", "vae_decoder", "--chunks", "2"]);
    other.out(folder.path().join("y")).is_refused(&["--chunks has no effect with --part vae_decoder"]);
    let other = Squeeze::new("export").arg(&container).args(["--to", "coreml", "--chunks", "3"]);
    other.out(folder.path().join("y")).is_refused(&["3 is not in 1..=2"]);
    let other = Squeeze::new("export").arg(&container).args(["--to", "single-file", "--chunks", "2"]);
    other.out(folder.path().join("y")).is_refused(&["--chunks has no effect with this --to"]);
    assert!(!folder.path().join("x.mlpackage").exists() && !folder.path().join("y").exists());
}
