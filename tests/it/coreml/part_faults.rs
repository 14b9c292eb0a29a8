//! Faults in packages of text encoders and VAEs that are otherwise good. Each of them must be found
//! and named.

use prost::Message;
use sdxl_squeeze::coreml::proto::mil_spec::tensor_value::Value as Content;
use sdxl_squeeze::coreml::proto::mil_spec::value::Value as Kind;
use sdxl_squeeze::coreml::proto::mil_spec::value::immediate_value::Value as Immediate;
use sdxl_squeeze::coreml::proto::mil_spec::{DataType, Operation, Value};
use sdxl_squeeze::coreml::verify;
use sdxl_squeeze::export::PipelinePart;

use super::faults::{Fault, bound, dimension, fault, inline, missed, output_type, tensor_type};
use super::file::{Package, blob_path, model_path};
use super::parts::{PARTS, write_part};
use crate::support::repo;

/// The content of a constant in the program.
fn content(op: &mut Operation) -> &mut Content {
    content_of(op.attributes.get_mut("val").unwrap())
}

pub(super) fn content_of(value: &mut Value) -> &mut Content {
    let Some(Kind::ImmediateValue(value)) = &mut value.value else { panic!() };
    let Some(Immediate::Tensor(tensor)) = &mut value.value else { panic!() };
    tensor.value.as_mut().unwrap()
}

/// Changes the constant that the first operation of a type reads as `parameter`, for this operation
/// alone.
fn other(package: &mut Package, kind: &str, parameter: &str, change: impl Fn(&mut Content)) {
    let name = bound(package.op(kind), parameter).clone();
    let mut constant = package.named(&name).clone();
    constant.outputs[0].name = "other".into();
    change(content(&mut constant));
    let operations = &mut package.block().operations;
    let at = operations.iter().position(|op| op.r#type == kind).unwrap();
    operations.insert(at, constant);
    *bound(package.op(kind), parameter) = "other".into();
}

fn integer(value: i32) -> impl Fn(&mut Content) {
    move |content| {
        let Content::Ints(list) = content else { panic!() };
        list.values[0] = value;
    }
}

fn truth(content: &mut Content) {
    let Content::Bools(list) = content else { panic!() };
    list.values[0] = !list.values[0];
}

fn text(value: &'static str) -> impl Fn(&mut Content) {
    move |content| {
        let Content::Strings(list) = content else { panic!() };
        list.values[0] = value.into();
    }
}

/// Faults of the second text encoder of `base-like`, whose end of a text is the highest id.
fn in_text() -> Vec<Fault> {
    vec![
        fault("there is no axis 2", |package| other(package, "gather", "axis", integer(2))),
        fault("says that it makes", |package| other(package, "gather", "axis", integer(1))),
        fault("in common with its indices", |package| other(package, "gather", "batch_dims", integer(1))),
        fault("in common with its indices", |package| other(package, "gather", "validate_indices", truth)),
        fault("where ids are needed", |package| *bound(package.op("gather"), "indices") = "input_ids".into()),
        fault("is not used by", |package| {
            let tokens = "text_model_embeddings_token_embedding".to_owned();
            *bound(package.named("text_model_embeddings_position_embedding"), "y") = tokens;
        }),
        fault("is not used by", |package| {
            let [q, k] = ["q", "k"].map(|part| format!("text_model_encoder_layers_0_self_attn_{part}_proj"));
            *bound(package.named(&k), "weight") = format!("{q}_weight");
        }),
        fault("there is no axis 3", |package| other(package, "reduce_argmax", "axis", integer(3))),
        fault("says that it makes", |package| other(package, "reduce_argmax", "keep_dims", truth)),
        fault("positions as `uint16`", |package| other(package, "reduce_argmax", "output_dtype", text("uint16"))),
        fault("`output_dtype` is missing", |package| drop(package.op("reduce_argmax").inputs.remove("output_dtype"))),
        fault("drops its axes", |package| other(package, "reduce_max", "keep_dims", truth)),
        fault("where ids are needed", |package| *bound(package.op("reduce_max"), "x") = "input_ids".into()),
        fault("where ids are needed", |package| *bound(package.op("equal"), "x") = "input_ids".into()),
        fault("a cast to `uint16`", |package| other(package, "cast", "dtype", text("uint16"))),
        fault("says that it makes", |package| other(package, "cast", "dtype", text("fp16"))),
        fault("the mask is", |package| {
            *bound(package.op("scaled_dot_product_attention"), "attn_mask") =
                "text_model_embeddings_position_embedding_weight".into()
        }),
        fault("has no parameter `mask`", |package| {
            let mask = package.op("scaled_dot_product_attention").inputs.remove("attn_mask").unwrap();
            package.op("scaled_dot_product_attention").inputs.insert("mask".into(), mask);
        }),
        fault("says that it makes", |package| output_type(package.op("equal")).data_type = DataType::Int32 as i32),
        fault("the program's outputs are not those of this text encoder", |package| {
            package.block().outputs.swap(0, 1);
            package.model.description.as_mut().unwrap().output.swap(0, 1);
        }),
        fault("the program's outputs are not those of this text encoder", |package| {
            package.block().outputs.pop();
            package.model.description.as_mut().unwrap().output.pop();
        }),
        fault("the description's outputs", |package| drop(package.model.description.as_mut().unwrap().output.pop())),
        fault("`sdxl-squeeze.text_encoder_config` is not JSON", |package| {
            entry(package, "sdxl-squeeze.text_encoder_config").push('x');
        }),
        fault("has both", |package| {
            let config = entry(package, "sdxl-squeeze.text_encoder_config").clone();
            let metadata = package.model.description.as_mut().unwrap().metadata.as_mut().unwrap();
            metadata.user_defined.insert("sdxl-squeeze.vae_decoder_config".into(), config);
        }),
        fault("it lacks `sdxl-squeeze.unet_config`, or the config of another network", |package| {
            let metadata = package.model.description.as_mut().unwrap().metadata.as_mut().unwrap();
            metadata.user_defined.remove("sdxl-squeeze.text_encoder_config").unwrap();
        }),
        fault("is not of this text encoder", |package| {
            let mut extra = package.named("text_model_final_layer_norm_weight").clone();
            extra.outputs[0].name = "extra".into();
            let mut norm = package.named("text_model_final_layer_norm").clone();
            norm.outputs[0].name = "again".into();
            *bound(&mut norm, "gamma") = "extra".into();
            *bound(&mut norm, "beta") = "extra".into();
            let operations = &mut package.block().operations;
            let at = operations.iter().position(|op| op.outputs[0].name == "text_model_final_layer_norm").unwrap();
            operations.insert(at, extra);
            operations.insert(at + 1, norm);
        }),
    ]
}

fn entry<'a>(package: &'a mut Package, key: &str) -> &'a mut String {
    package.model.description.as_mut().unwrap().metadata.as_mut().unwrap().user_defined.get_mut(key).unwrap()
}

/// Faults of the VAE's decoder, which is computed in fp32.
fn in_decoder() -> Vec<Fault> {
    vec![
        fault("cannot become fp16", |package| {
            text("fp16")(content_of(inline(package.op("constexpr_cast"), "output_dtype")));
        }),
        fault("`output_dtype` is missing", |package| drop(package.op("constexpr_cast").inputs.remove("output_dtype"))),
        fault("`source_val` is missing", |package| drop(package.op("constexpr_cast").inputs.remove("source_val"))),
        fault("bytes of fp16", |package| {
            tensor_type(inline(package.op("constexpr_cast"), "source_val")).data_type = DataType::Float32 as i32;
        }),
        fault("says that it makes", |package| output_type(package.op("constexpr_cast")).data_type = DataType::Float16 as i32),
        fault("says that it makes", |package| dimension(output_type(package.op("constexpr_cast")), 0, 1)),
        fault("is not used by", |package| {
            *bound(package.named("decoder_mid_block_resnets_0_conv2"), "weight") =
                "decoder_mid_block_resnets_0_conv1_weight".into();
        }),
        fault("the program's inputs are not those of this VAE decoder", |package| {
            let function = package.program().functions.get_mut("main").unwrap();
            function.inputs[0].name = "latents".into();
            package.model.description.as_mut().unwrap().input[0].name = "latents".into();
            for op in &mut package.block().operations {
                for argument in op.inputs.values_mut().flat_map(|argument| &mut argument.arguments) {
                    use sdxl_squeeze::coreml::proto::mil_spec::argument::binding::Binding;
                    if matches!(&argument.binding, Some(Binding::Name(name)) if name == "z") {
                        argument.binding = Some(Binding::Name("latents".into()));
                    }
                }
            }
        }),
        fault("the program's outputs are not those of this VAE decoder", |package| {
            package.block().outputs = vec!["decoder_conv_act".into()];
            let name = "decoder_conv_act".to_owned();
            let shape = sizes(package, &name);
            let output = &mut package.model.description.as_mut().unwrap().output[0];
            output.name = name;
            use sdxl_squeeze::coreml::proto::specification::feature_type;
            let Some(feature_type::Type::MultiArrayType(array)) = &mut output.r#type.as_mut().unwrap().r#type else { panic!() };
            array.shape = shape;
        }),
        // The last convolution is there twice, and one of the two makes the output.
        fault("`decoder_conv_out_weight` is not used by `image` alone", |package| {
            let mut copy = package.named("image").clone();
            copy.outputs[0].name = "picture".into();
            package.block().operations.push(copy);
        }),
    ]
}

/// The declared shape of a value.
fn sizes(package: &mut Package, name: &str) -> Vec<i64> {
    super::file::declared(package.named(name).outputs[0].r#type.as_ref()).1
}

#[test]
fn each_fault_of_a_part_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("bad.mlpackage");
    let model = repo("tests/golden/base-like");
    let mut not_found = Vec::new();
    for (part, faults) in [(PipelinePart::TextEncoder2, in_text()), (PipelinePart::VaeDecoder, in_decoder())] {
        let out = folder.path().join(format!("{part}.mlpackage"));
        write_part(&model, part, [8, 8], &out);
        let good = Package::read(&out);
        not_found.extend(missed(&good, &faults, &path).into_iter().map(|missed| format!("{part} {missed}")));
    }
    assert!(not_found.is_empty(), "{}:\n{}", not_found.len(), not_found.join("\n"));
}

/// Flips one bit at each of some places of every part's package: the result is always an error.
#[test]
fn damage_of_a_part_is_found() {
    let folder = tempfile::tempdir().unwrap();
    for part in PARTS {
        let out = folder.path().join(format!("{part}.mlpackage"));
        write_part(&repo("tests/golden/base-like"), part, [8, 8], &out);
        let good = Package::read(&out);
        let model = good.model.encode_to_vec();
        for (file, content) in [(blob_path(&out), &good.blobs), (model_path(&out), &model)] {
            for i in 0..40usize {
                let at = i.wrapping_mul(0x9e37_79b9) % content.len();
                let mut damaged = content.clone();
                damaged[at] ^= 1 << (i % 8);
                std::fs::write(&file, &damaged).unwrap();
                assert!(verify(&out).is_err(), "{part}: {}, byte {at}", file.display());
            }
            std::fs::write(&file, content).unwrap();
        }
        verify(&out).unwrap();
    }
}
