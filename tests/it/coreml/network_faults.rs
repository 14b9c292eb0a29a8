//! Faults in packages and containers of compressed text encoders and VAEs that are otherwise good.
//! Each of them must be found and named.

use std::path::Path;

use half::f16;
use sdxl_squeeze::checkpoint::{TensorSource, TensorSpec};
use sdxl_squeeze::codebook::{BitWidth, Codebook};
use sdxl_squeeze::container::{CompressedWeight, ContainerInfo, ContainerWriter, Network};
use sdxl_squeeze::coreml::proto::mil_spec::tensor_value::Value as Content;
use sdxl_squeeze::coreml::proto::mil_spec::{DataType, Operation};
use sdxl_squeeze::coreml::{Label, verify};
use sdxl_squeeze::device::Placement;
use sdxl_squeeze::export::{PipelinePart, coreml_part};
use sdxl_squeeze::model::text::ClipText;
use sdxl_squeeze::model::vae::VaeDecoder;
use sdxl_squeeze::pipeline::{ModelFiles, PipelineFolder, verify as verify_container};
use sdxl_squeeze::progress::Silent;
use serde_json::{Map, Value, json};
use tch::{Device, Kind};

use super::faults::{Fault, bound, dimension, error_chain, fault, inline, missed, output_type, tensor_type};
use super::file::Package;
use super::part_faults::content_of;
use crate::support::repo;

const LUT: &str = "constexpr_lut_to_dense";

/// Tensors in fp16.
type Tensors = Vec<(TensorSpec, Vec<f16>)>;

/// The tensors of a network of the small base, and its config.
fn network(network: Network) -> (Tensors, Map<String, Value>) {
    let pipeline = PipelineFolder::open(&repo("tests/golden/base-like")).unwrap();
    let read = |specs: Vec<TensorSpec>, source: &dyn TensorSource| {
        let values = |spec: &TensorSpec| {
            let tensor = source.tensor(&spec.name, &spec.shape).unwrap().to_kind(Kind::Half).flatten(0, -1);
            Vec::<f16>::try_from(&tensor).unwrap()
        };
        specs.into_iter().map(|spec| (spec.clone(), values(&spec))).collect()
    };
    let placement = Placement { device: Device::Cpu, kind: Kind::Half };
    if network == Network::Vae {
        let weights = pipeline.vae_network().unwrap();
        let specs = VaeDecoder::tensors(&pipeline.vae).unwrap();
        return (read(specs, weights.source(placement).as_ref()), pipeline.vae_config().clone());
    }
    let part = pipeline.text_encoders.iter().find(|part| part.encoder == network.to_string()).unwrap();
    let weights = pipeline.text_network(part).unwrap();
    let specs = ClipText::tensors(&part.config).unwrap();
    (read(specs, weights.source(placement).as_ref()), part.config_entries().clone())
}

/// Writes tensors as the container of a network. Kernels and matrices with an even number of rows
/// have two palettes of 2 bits, which hold values of theirs and are few enough to lie in a program.
fn write(tensors: &[(TensorSpec, Vec<f16>)], network: Network, config: Map<String, Value>, path: &Path) {
    let info = ContainerInfo { network, config, recipe: json!({ "made": "up" }), sources: Vec::new(), prediction_type: None };
    let mut writer = ContainerWriter::create(path, info).unwrap();
    for (TensorSpec { name, shape }, values) in tensors {
        let bits = BitWidth::Two;
        if shape.len() < 2 || shape[0] % 2 != 0 || values.len() < 2 * bits.entries() {
            writer.add_tensor(name, shape, values).unwrap();
            continue;
        }
        let palettes = values[..2 * bits.entries()].to_vec();
        let codebook = Codebook { bits, axis: 0, group_size: shape[0] as usize / 2, vector_length: 1, palettes, scales: None };
        let indices: Vec<u8> = (0..values.len()).map(|i| (i % bits.entries()) as u8).collect();
        let weight = CompressedWeight::palettized(shape.clone(), None, codebook, &indices).unwrap();
        writer.add_weight(name, &weight, Value::Null).unwrap();
    }
    writer.finish().unwrap();
}

/// A good package of a compressed network.
fn good(network_name: Network, part: PipelinePart, folder: &Path) -> Package {
    let path = folder.join(format!("{part}.safetensors"));
    let (tensors, config) = network(network_name);
    write(&tensors, network_name, config, &path);
    verify_container(&path).unwrap();
    let mut files = ModelFiles::of(repo("tests/golden/base-like"));
    match network_name {
        Network::Vae => files.vae = Some(path),
        _ => files.text_encoder_2 = Some(path),
    }
    let out = folder.join(format!("{part}.mlpackage"));
    let pipeline = PipelineFolder::open_files(&files).unwrap();
    let written = coreml_part(&pipeline, part, [8, 8], &Label::default(), &out, &Silent).unwrap();
    let found = verify(&out).unwrap();
    assert!(found.hashed && found.named && written.compressed > 5 && found.compressed == written.compressed);
    Package::read(&out)
}

/// The operation that decodes the first compressed weight.
fn decoding(package: &mut Package) -> &mut Operation {
    package.op(LUT)
}

/// Replaces the metadata key of the network's config.
fn renamed_config(package: &mut Package, old: &str, new: &str) {
    let entries = &mut package.model.description.as_mut().unwrap().metadata.as_mut().unwrap().user_defined;
    let config = entries.remove(old).unwrap();
    entries.insert(new.into(), config);
}

/// Faults of any compressed network in `element`.
fn in_either(element: DataType) -> Vec<Fault> {
    vec![
        // Half of a table: the other half of the indices would be beyond it.
        fault("the lut is", |package| {
            let lut = inline(decoding(package), "lut");
            let entries = tensor_type(lut).dimensions.len() - 2;
            dimension(tensor_type(lut), entries, 2);
            match content_of(lut) {
                Content::Bytes(bytes) => bytes.values.truncate(bytes.values.len() / 2),
                Content::Floats(floats) => floats.values.truncate(floats.values.len() / 2),
                other => panic!("{other:?}"),
            }
        }),
        // One palette of 8 entries in the place of two of 4.
        fault("the lut is", |package| {
            let lut = tensor_type(inline(decoding(package), "lut"));
            let entries = lut.dimensions.len() - 2;
            dimension(lut, 0, 1);
            dimension(lut, entries, 8);
        }),
        // Three palettes for a number of rows that three does not divide, and too few values.
        fault("which are not", |package| dimension(tensor_type(inline(decoding(package), "lut")), 0, 3)),
        fault("which are not", |package| {
            tensor_type(inline(decoding(package), "indices")).data_type = DataType::Uint4 as i32;
        }),
        fault("which are not", |package| {
            let indices = tensor_type(inline(decoding(package), "indices"));
            dimension(indices, 0, 2);
        }),
        fault("`lut` is missing", |package| drop(decoding(package).inputs.remove("lut"))),
        fault("`indices` is missing", |package| drop(decoding(package).inputs.remove("indices"))),
        fault("has NaN or infinite values", |package| match content_of(inline(decoding(package), "lut")) {
            Content::Bytes(bytes) => bytes.values[..2].copy_from_slice(&f16::NAN.to_le_bytes()),
            Content::Floats(floats) => floats.values[0] = f32::INFINITY,
            other => panic!("{other:?}"),
        }),
        fault("is kept in the wrong way for", move |package| {
            let other = if element == DataType::Float16 { DataType::Float32 } else { DataType::Float16 };
            tensor_type(inline(decoding(package), "lut")).data_type = other as i32;
        }),
        fault("says that it makes", |package| dimension(output_type(decoding(package)), 0, 2)),
        fault("says that it makes", move |package| {
            let other = if element == DataType::Float16 { DataType::Float32 } else { DataType::Float16 };
            output_type(decoding(package)).data_type = other as i32;
        }),
    ]
}

/// Faults of the second text encoder.
fn in_text() -> Vec<Fault> {
    let layer = |part: &str| format!("text_model_encoder_layers_0_self_attn_{part}_proj");
    vec![
        fault("is not used by", move |package| *bound(package.named(&layer("k")), "weight") = layer("q") + "_weight"),
        fault("there is no `text_model_encoder_layers_0_self_attn_q_proj_weight`", move |package| {
            package.named(&(layer("q") + "_weight")).outputs[0].name = "other".into();
            *bound(package.named(&layer("q")), "weight") = "other".into();
        }),
        fault("the weight `extra` is not of this text encoder", move |package| {
            let mut extra = package.named(&(layer("q") + "_weight")).clone();
            extra.outputs[0].name = "extra".into();
            let mut bias = package.named(&(layer("q") + "_bias")).clone();
            bias.outputs[0].name = "extra_bias".into();
            let mut again = package.named(&layer("q")).clone();
            again.outputs[0].name = "again".into();
            *bound(&mut again, "weight") = "extra".into();
            *bound(&mut again, "bias") = "extra_bias".into();
            let operations = &mut package.block().operations;
            let at = operations.iter().position(|op| op.outputs[0].name == layer("q")).unwrap();
            operations.splice(at..at, [extra, bias, again]);
        }),
        fault("sdxl-squeeze.unet_config", |package| {
            renamed_config(package, "sdxl-squeeze.text_encoder_config", "sdxl-squeeze.unet_config");
        }),
        fault("the program's inputs are not those of this VAE decoder", |package| {
            renamed_config(package, "sdxl-squeeze.text_encoder_config", "sdxl-squeeze.vae_decoder_config");
        }),
    ]
}

/// Faults of the VAE's decoder.
fn in_decoder() -> Vec<Fault> {
    const LAYER: &str = "decoder_mid_block_resnets_0_conv2";
    vec![
        fault("is not used by", |package| {
            *bound(package.named(LAYER), "weight") = "decoder_mid_block_resnets_0_conv1_weight".into();
        }),
        fault("there is no `decoder_mid_block_resnets_0_conv2_weight`", |package| {
            package.named("decoder_mid_block_resnets_0_conv2_weight").outputs[0].name = "other".into();
            *bound(package.named(LAYER), "weight") = "other".into();
        }),
        fault("the program's inputs are not those of this VAE encoder", |package| {
            renamed_config(package, "sdxl-squeeze.vae_decoder_config", "sdxl-squeeze.vae_encoder_config");
        }),
    ]
}

#[test]
fn each_fault_of_a_compressed_network_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("bad.mlpackage");
    let mut found = Vec::new();
    for (network, part, faults) in [
        (Network::TextEncoder2, PipelinePart::TextEncoder2, [in_either(DataType::Float16), in_text()]),
        (Network::Vae, PipelinePart::VaeDecoder, [in_either(DataType::Float32), in_decoder()]),
    ] {
        let good = good(network, part, folder.path());
        let missed = faults.iter().flat_map(|faults| missed(&good, faults, &path));
        found.extend(missed.map(|missed| format!("{part} {missed}")));
    }
    assert!(found.is_empty(), "{}:\n{}", found.len(), found.join("\n"));
}

/// What is wrong in a container: a change of the tensors or of the config, the network that the
/// container names, and what `verify` must say.
type Wrong = (fn(&mut Tensors, &mut Map<String, Value>), Network, &'static [&'static str]);

#[test]
fn each_fault_of_a_networks_container_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let of_text: [Wrong; 7] = [
        (|_, _| {}, Network::TextEncoder2, &[]),
        (|tensors, _| drop(tensors.remove(0)), Network::TextEncoder2, &["token_embedding.weight", "missing"]),
        (
            |tensors, _| tensors.push(extra("text_model.encoder.layers.9.mlp.fc1.bias")),
            Network::TextEncoder2,
            &["layers.9.mlp.fc1.bias"],
        ),
        (
            |tensors, _| shortened(tensors, "text_model.final_layer_norm.bias"),
            Network::TextEncoder2,
            &["text_model.final_layer_norm.bias is ["],
        ),
        (|_, config| drop(config.insert("hidden_size".into(), json!(1))), Network::TextEncoder2, &["hidden_size"]),
        (|_, _| {}, Network::Vae, &["50 missing", "unknown to this architecture"]),
        (|_, _| {}, Network::Unet, &["`addition_embed_type`"]),
    ];
    let of_vae: [Wrong; 5] = [
        (|_, _| {}, Network::Vae, &[]),
        (|tensors, _| drop(tensors.pop()), Network::Vae, &["missing"]),
        // One tensor of the encoder, which is stored whole or not at all.
        (|tensors, _| tensors.push(extra("encoder.conv_in.bias")), Network::Vae, &["encoder.conv_in.weight", "missing"]),
        (|tensors, _| shortened(tensors, "decoder.conv_out.bias"), Network::Vae, &["decoder.conv_out.bias is ["]),
        (|_, _| {}, Network::TextEncoder, &["`architectures` is missing"]),
    ];
    let mut found = Vec::new();
    for (of, faults) in [(Network::TextEncoder2, &of_text[..]), (Network::Vae, &of_vae[..])] {
        for (at, (put, named, words)) in faults.iter().enumerate() {
            let (mut tensors, mut config) = network(of);
            put(&mut tensors, &mut config);
            let path = folder.path().join(format!("{of}-{at}.safetensors"));
            write(&tensors, *named, config, &path);
            match verify_container(&path) {
                Ok(_) if words.is_empty() => {}
                Ok(_) => found.push(format!("{of} {at}: {words:?}: not found")),
                Err(error) => {
                    let said = error_chain(&error);
                    if words.is_empty() || !error.is_bad_input() || !words.iter().all(|word| said.contains(word)) {
                        found.push(format!("{of} {at}: {words:?}: {said}"));
                    }
                }
            }
        }
    }
    assert!(found.is_empty(), "{}:\n{}", found.len(), found.join("\n"));
}

/// A tensor that no network here has.
fn extra(name: &str) -> (TensorSpec, Vec<f16>) {
    (TensorSpec { name: name.to_owned(), shape: vec![3] }, vec![f16::ONE; 3])
}

/// Takes the last number of a vector.
fn shortened(tensors: &mut [(TensorSpec, Vec<f16>)], name: &str) {
    let (spec, values) = tensors.iter_mut().find(|(spec, _)| spec.name == name).unwrap();
    values.pop();
    spec.shape = vec![values.len() as i64];
}
