//! Faults in a package that is otherwise good. Each of them must be found and named.

use std::path::Path;

use prost::Message;
use sdxl_squeeze::Error;
use sdxl_squeeze::container::Container;
use sdxl_squeeze::coreml::proto::mil_spec::argument::{Binding, binding};
use sdxl_squeeze::coreml::proto::mil_spec::tensor_value::Value as Content;
use sdxl_squeeze::coreml::proto::mil_spec::value::Value as Kind;
use sdxl_squeeze::coreml::proto::mil_spec::value::immediate_value::Value as Immediate;
use sdxl_squeeze::coreml::proto::mil_spec::{Argument, DataType, Operation, TensorType, Value, value_type};
use sdxl_squeeze::coreml::proto::specification::feature_type;
use sdxl_squeeze::coreml::{Options, verify, write};
use sdxl_squeeze::pipeline::UnetWeights;
use sdxl_squeeze::progress::Silent;
use serde_json::json;

use super::file::{Package, blob_path, model_path};
use super::made_up;
use crate::squeeze::Squeeze;
use crate::support::repo;

/// A package with weights of every kind.
fn good(folder: &Path) -> Package {
    let path = folder.join("c.safetensors");
    made_up::container(&repo("tests/golden/base-like"), &path);
    let container = Container::open(&path).unwrap();
    let chain = UnetWeights::from(&container).chain().unwrap();
    let out = folder.join("good.mlpackage");
    write(UnetWeights::Container(&container), &Options::new(chain.config()), &out, &Silent).unwrap();
    assert!(verify(&out).unwrap().hashed);
    Package::read(&out)
}

pub(super) fn tensor_type(value: &mut Value) -> &mut TensorType {
    let Some(value_type::Type::TensorType(tensor)) = &mut value.r#type.as_mut().unwrap().r#type else { panic!() };
    tensor
}

/// The declared type of an operation's first output.
pub(super) fn output_type(op: &mut Operation) -> &mut TensorType {
    let Some(value_type::Type::TensorType(tensor)) = &mut op.outputs[0].r#type.as_mut().unwrap().r#type else { panic!() };
    tensor
}

/// The value of an inline parameter.
pub(super) fn inline<'a>(op: &'a mut Operation, parameter: &str) -> &'a mut Value {
    let Some(binding::Binding::Value(value)) = &mut op.inputs.get_mut(parameter).unwrap().arguments[0].binding else { panic!() };
    value
}

/// The name of the value that a parameter is bound to.
pub(super) fn bound<'a>(op: &'a mut Operation, parameter: &str) -> &'a mut String {
    let Some(binding::Binding::Name(name)) = &mut op.inputs.get_mut(parameter).unwrap().arguments[0].binding else { panic!() };
    name
}

/// The offset at which the record of a value begins in the weight file.
fn offset(value: &mut Value) -> &mut u64 {
    let Some(Kind::BlobFileValue(place)) = &mut value.value else { panic!() };
    &mut place.offset
}

pub(super) fn dimension(tensor: &mut TensorType, at: usize, size: u64) {
    use sdxl_squeeze::coreml::proto::mil_spec::dimension::{ConstantDimension, Dimension};
    tensor.dimensions[at].dimension = Some(Dimension::Constant(ConstantDimension { size }));
}

fn number(blobs: &[u8], at: usize) -> usize {
    u64::from_le_bytes(blobs[at..at + 8].try_into().unwrap()) as usize
}

/// The offsets at which the record of an inline parameter and the data of this record begin.
fn record(package: &mut Package, kind: &str, parameter: &str) -> (usize, usize) {
    let at = *offset(inline(package.op(kind), parameter)) as usize;
    (at, number(&package.blobs, at + 16))
}

const LUT: &str = "constexpr_lut_to_sparse";
const MASK: &str = "indices_mask";

pub(super) type Fault = (&'static str, Box<dyn Fn(&mut Package)>);

pub(super) fn fault(expected: &'static str, put: impl Fn(&mut Package) + 'static) -> Fault {
    (expected, Box::new(put))
}

fn in_blobs() -> Vec<Fault> {
    let at_mask = |put: fn(&mut Vec<u8>, usize)| {
        move |package: &mut Package| {
            let (at, _) = record(package, LUT, MASK);
            put(&mut package.blobs, at);
        }
    };
    vec![
        fault("unknown dtype 77", at_mask(|blobs, at| blobs[at + 4] = 77)),
        fault("bytes of uint2", at_mask(|blobs, at| blobs[at + 4] = 10)),
        fault("begins with", at_mask(|blobs, at| blobs[at] ^= 1)),
        fault("beyond the end of the file", at_mask(|blobs, at| blobs[at + 14] = 1)),
        fault("says that its data begins at", at_mask(|blobs, at| blobs[at + 16] ^= 64)),
        fault("says that 9 bits are unused", at_mask(|blobs, at| blobs[at + 24] = 9)),
        fault("reserved bytes that are not zero", at_mask(|blobs, at| blobs[at + 40] = 1)),
        fault("the header says", |package| package.blobs[0] ^= 1),
        fault("blob storage of version 1", |package| package.blobs[4] = 1),
        fault("the header's reserved bytes", |package| package.blobs[33] = 1),
        fault("beyond the end of the file", |package| package.blobs.truncate(package.blobs.len() - 1)),
        fault("is cut off", |package| package.blobs.truncate(40)),
        fault("begins with 0x0", |package| package.blobs.extend([0; 65])),
        fault("begins with 0x1010101", |package| package.blobs.extend([1; 128])),
        // The changed byte is padding between the data of a mask and the next record.
        fault("are not zero", |package| {
            let (at, data) = record(package, LUT, MASK);
            let end = data + number(&package.blobs, at + 8);
            assert_ne!(end % 64, 0);
            package.blobs[end] = 1;
        }),
        fault("bits set after its last number", |package| {
            // The damaged record is the first one with unused bits.
            let records =
                (0..package.blobs.len()).step_by(64).filter(|at| package.blobs[*at..*at + 4] == [0xef, 0xbe, 0xad, 0xde]);
            let at = records.into_iter().find(|at| package.blobs[at + 24] != 0).unwrap();
            let end = number(&package.blobs, at + 16) + number(&package.blobs, at + 8);
            package.blobs[end - 1] |= 0x80;
        }),
        // The mask keeps one element more or one less than there are values.
        fault("the mask keeps", |package| {
            let (_, data) = record(package, LUT, MASK);
            package.blobs[data] ^= 1;
        }),
        fault("the mask keeps", |package| {
            let kind = "constexpr_sparse_to_dense";
            let ops = package.block().operations.iter_mut();
            let op = ops
                .filter(|op| op.r#type == kind)
                .find(|op| {
                    op.inputs.contains_key("mask")
                        && matches!(&op.inputs["mask"].arguments[0].binding, Some(binding::Binding::Value(_)))
                })
                .unwrap();
            let at = *offset(inline(op, "mask")) as usize;
            let data = number(&package.blobs, at + 16);
            package.blobs[data] ^= 1;
        }),
        // One of the fp16 values is NaN.
        fault("NaN or infinite", |package| {
            let at = *offset(package.named("down_blocks_1_attentions_0_norm_weight").attributes.get_mut("val").unwrap()) as usize;
            let data = number(&package.blobs, at + 16);
            package.blobs[data..data + 2].copy_from_slice(&[0, 0x7e]);
        }),
        // These faults leave the structure valid, so only the hash of the weights reveals them.
        // They change the order of bits, an index, a palette entry, and a weight.
        fault("the weights are damaged", |package| {
            let masks = package.block().operations.iter_mut().filter(|op| op.r#type == LUT);
            let masks: Vec<usize> = masks.map(|op| *offset(inline(op, MASK)) as usize).collect();
            let bytes = masks.iter().flat_map(|at| (64..64 + number(&package.blobs, at + 8)).map(move |byte| at + byte));
            let at = bytes.into_iter().find(|at| package.blobs[*at].reverse_bits() != package.blobs[*at]).unwrap();
            package.blobs[at] = package.blobs[at].reverse_bits();
        }),
        fault("the weights are damaged", |package| {
            let (_, data) = record(package, LUT, "indices_nonzero_data");
            package.blobs[data] ^= 1;
        }),
        fault("the weights are damaged", |package| {
            let (_, data) = record(package, "constexpr_lut_to_dense", "indices");
            package.blobs[data] ^= 1;
        }),
    ]
}

fn in_program() -> Vec<Fault> {
    vec![
        fault("a specification of version 8", |package| package.model.specification_version = 8),
        fault("not an ML Program", |package| package.model.r#type = None),
        fault("a program of version 2", |package| package.program().version = 2),
        fault("the program has the attribute `x`", |package| {
            let value = package.op("const").attributes["name"].clone();
            package.program().attributes.insert("x".into(), value);
        }),
        fault("the program's functions are", |package| {
            let main = package.program().functions.remove("main").unwrap();
            package.program().functions.insert("other".into(), main);
        }),
        fault("the operator set is `CoreML7`", |package| {
            package.program().functions.get_mut("main").unwrap().opset = "CoreML7".into()
        }),
        fault("there is no block for CoreML8", |package| {
            let function = package.program().functions.get_mut("main").unwrap();
            let block = function.block_specializations.remove("CoreML8").unwrap();
            function.block_specializations.insert("CoreML7".into(), block);
        }),
        fault("which is not there yet", |package| *bound(package.op("conv"), "x") = "nothing".into()),
        fault("which is not there yet", |package| {
            // The first convolution is moved before the weight that it reads.
            let operations = &mut package.block().operations;
            let at = operations.iter().position(|op| op.r#type == "conv").unwrap();
            let conv = operations.remove(at);
            let first = operations.iter().position(|op| op.outputs[0].name == "conv_in_weight").unwrap();
            operations.insert(first, conv);
        }),
        fault("the name `conv_in` is used twice", |package| package.named("conv_norm_out").outputs[0].name = "conv_in".into()),
        fault("is not an identifier", |package| package.op("silu").outputs[0].name = "a.b".into()),
        fault("is not an identifier", |package| package.op("silu").outputs[0].name = String::new()),
        fault("is not an identifier", |package| package.op("silu").outputs[0].name = "1a".into()),
        fault("says that it makes", |package| {
            let tensor = output_type(package.op("conv"));
            dimension(tensor, 1, 9);
        }),
        fault("says that it makes", |package| {
            let tensor = output_type(package.op("conv"));
            tensor.data_type = DataType::Float32 as i32;
        }),
        fault("says that it makes", |package| drop(package.op("split").outputs.pop())),
        fault("is of rank 9", |package| {
            let tensor = output_type(package.op("conv"));
            tensor.rank = 9;
        }),
        fault("not a positive number", |package| {
            let tensor = output_type(package.op("conv"));
            dimension(tensor, 1, 0);
        }),
        fault("`pad_type` is missing", |package| drop(package.op("conv").inputs.remove("pad_type"))),
        fault("has no parameter `alpha`", |package| {
            let op = package.op("conv");
            let strides = op.inputs["strides"].clone();
            op.inputs.insert("alpha".into(), strides);
        }),
        fault("unknown operation `relu`", |package| package.op("silu").r#type = "relu".into()),
        fault("is not one value", |package| {
            let argument: &mut Argument = package.op("conv").inputs.get_mut("x").unwrap();
            argument.arguments.push(argument.arguments[0].clone());
        }),
        fault("is bound to nothing", |package| {
            package.op("conv").inputs.get_mut("x").unwrap().arguments = vec![Binding { binding: None }];
        }),
        fault("has the attributes", |package| drop(package.op("silu").attributes.remove("name"))),
        fault("has the attributes", |package| {
            let value = package.op("const").attributes["name"].clone();
            package.op("silu").attributes.insert("x".into(), value);
        }),
        fault("has blocks", |package| {
            let block = sdxl_squeeze::coreml::proto::mil_spec::Block::default();
            package.op("silu").blocks.push(block);
        }),
        fault("docString", |package| package.named("conv_in_bias").attributes.get_mut("val").unwrap().doc_string = "x".into()),
        fault("which are not", |package| dimension(tensor_type(inline(package.op("constexpr_lut_to_dense"), "lut")), 0, 2)),
        fault("the lut is", |package| {
            // The shape is that of a table with one bit more and half as many groups, which has as
            // many bytes.
            let halved =
                |op: &&mut Operation| op.inputs.contains_key("lut") && sizes(&mut (**op).clone(), "lut")[0].is_multiple_of(2);
            let op = package.block().operations.iter_mut().find(halved).unwrap();
            let shape = sizes(op, "lut");
            let entries = shape.len() - 2;
            let lut = tensor_type(inline(op, "lut"));
            dimension(lut, 0, shape[0] / 2);
            dimension(lut, entries, 2 * shape[entries]);
        }),
        fault("`vector_axis` is missing", |package| drop(vectors(package, "indices").inputs.remove("vector_axis"))),
        fault("`vector_axis` is missing", |package| drop(vectors(package, MASK).inputs.remove("vector_axis"))),
        fault("there is no axis 7", |package| *axis(vectors(package, "indices")) = 7),
        // Along another axis the weight has another shape.
        fault("says that it makes", |package| *axis(vectors(package, "indices")) = 1),
        fault("says that it makes", |package| *axis(vectors(package, MASK)) = 1),
        fault("`vector_axis` is", |package| {
            tensor_type(inline(vectors(package, MASK), "vector_axis")).data_type = DataType::Float32 as i32;
        }),
        fault("has no parameter `vector_axis`", |package| {
            let value = vectors(package, "indices").inputs["vector_axis"].clone();
            package.op("constexpr_sparse_to_dense").inputs.insert("vector_axis".into(), value);
        }),
        fault("there is no record at", |package| *offset(inline(package.op(LUT), MASK)) += 64),
        fault("there is no record at", |package| *offset(inline(package.op(LUT), MASK)) = u64::MAX),
        fault("the mask keeps", |package| {
            let other = *offset(inline(package.op(LUT), "indices_nonzero_data"));
            *offset(inline(package.op(LUT), MASK)) = other;
        }),
        fault("not in @model_path", |package| {
            let Some(Kind::BlobFileValue(place)) = &mut inline(package.op(LUT), MASK).value else { panic!() };
            place.file_name = "/etc/passwd".into();
        }),
        fault("has no value", |package| inline(package.op(LUT), MASK).value = None),
        fault("mask and values of two different weights", |package| {
            // The values are those of another weight that keeps as many elements.
            let scalar = |op: &&Operation| op.r#type == LUT && !op.inputs.contains_key("vector_axis");
            let names: Vec<String> =
                package.block().operations.iter().filter(scalar).map(|op| op.outputs[0].name.clone()).collect();
            let ones: Vec<u64> = names.iter().map(|name| sizes(package.named(name), "indices_nonzero_data")[0]).collect();
            let (a, b) = (0..names.len()).flat_map(|a| (0..a).map(move |b| (a, b))).find(|(a, b)| ones[*a] == ones[*b]).unwrap();
            let values = names[b].replace("_palettized_0", "_palettized_1");
            let dense = names[a].replace("_palettized_0", "");
            *bound(package.named(&dense), "nonzero_data") = values;
        }),
        fault("NaN or infinite", |package| {
            let halves = package.block().operations.iter_mut().filter_map(|op| op.attributes.get_mut("val"));
            let value = halves.into_iter().find_map(|value| match &mut value.value {
                Some(Kind::ImmediateValue(value)) => match &mut value.value {
                    Some(Immediate::Tensor(tensor)) => match &mut tensor.value {
                        Some(Content::Bytes(list)) if list.values.len() > 4 => Some(&mut list.values),
                        _ => None,
                    },
                    _ => None,
                },
                _ => None,
            });
            value.unwrap()[..2].copy_from_slice(&[0, 0x7c]);
        }),
        fault("which are not", |package| {
            let op = package.block().operations.iter_mut().find(|op| op.outputs[0].name.ends_with("_pad"));
            let value = op.unwrap().attributes.get_mut("val").unwrap();
            if let Some(Kind::ImmediateValue(value)) = &mut value.value
                && let Some(Immediate::Tensor(tensor)) = &mut value.value
                && let Some(Content::Ints(list)) = &mut tensor.value
            {
                list.values.pop();
            }
        }),
        fault("is not computed", |package| package.block().outputs = vec!["conv_in_bias".into()]),
        fault("is not computed", |package| package.block().outputs = vec!["sample".into()]),
        fault("is never made", |package| package.block().outputs = vec!["noise".into()]),
        fault("has no output", |package| package.block().outputs.clear()),
        // These programs are valid, but they do not compute this UNet.
        fault("there is no `conv_in_weight`", |package| {
            package.named("conv_in_weight").outputs[0].name = "weight".into();
            *bound(package.named("conv_in"), "weight") = "weight".into();
        }),
        fault("alone", |package| {
            let [q, k] = ["to_q", "to_k"].map(|layer| format!("down_blocks_1_attentions_0_transformer_blocks_0_attn1_{layer}"));
            *bound(package.named(&k), "weight") = format!("{q}_weight");
        }),
        fault("is not of this UNet", |package| {
            let mut extra = package.named("conv_norm_out_weight").clone();
            extra.outputs[0].name = "extra".into();
            let operations = &mut package.block().operations;
            let at = operations.iter().position(|op| op.outputs[0].name == "conv_norm_out").unwrap();
            operations.insert(at, extra);
            let mut norm = package.named("conv_norm_out").clone();
            norm.outputs[0].name = "again".into();
            *bound(&mut norm, "gamma") = "extra".into();
            *bound(&mut norm, "beta") = "extra".into();
            package.block().operations.insert(at + 2, norm);
        }),
        fault("nothing uses the record at", |package| {
            // Two values share one record, so no value points to the other record.
            let other = *offset(package.named("up_blocks_1_attentions_0_norm_weight").attributes.get_mut("val").unwrap());
            *offset(package.named("up_blocks_1_attentions_0_norm_bias").attributes.get_mut("val").unwrap()) = other;
            package.forget_maker();
        }),
        fault("the description's inputs", |package| package.model.description.as_mut().unwrap().input[0].name = "x".into()),
        fault("the description's inputs", |package| drop(package.model.description.as_mut().unwrap().input.pop())),
        fault("the description's outputs", |package| {
            let output = &mut package.model.description.as_mut().unwrap().output[0];
            let Some(feature_type::Type::MultiArrayType(array)) = &mut output.r#type.as_mut().unwrap().r#type else { panic!() };
            array.data_type = 65552;
        }),
        fault("the model has no description", |package| package.model.description = None),
        // Only the hash of the program reveals these faults.
        fault("the program is damaged", |package| {
            package.model.description.as_mut().unwrap().metadata.as_mut().unwrap().license = "none".into();
        }),
        fault("the program is damaged", |package| {
            package.op("gelu").attributes.insert("name".into(), name_of("other"));
        }),
    ]
}

/// The first operation with vectors and this parameter.
fn vectors<'a>(package: &'a mut Package, parameter: &str) -> &'a mut Operation {
    let mut operations = package.block().operations.iter_mut();
    operations.find(|op| op.inputs.contains_key("vector_axis") && op.inputs.contains_key(parameter)).unwrap()
}

/// The value of the axis of vectors.
fn axis(op: &mut Operation) -> &mut i32 {
    let Some(Kind::ImmediateValue(value)) = &mut inline(op, "vector_axis").value else { panic!() };
    let Some(Immediate::Tensor(tensor)) = &mut value.value else { panic!() };
    let Some(Content::Ints(list)) = &mut tensor.value else { panic!() };
    &mut list.values[0]
}

/// A string as the value of an attribute.
fn name_of(name: &str) -> Value {
    use sdxl_squeeze::coreml::proto::mil_spec::tensor_value::RepeatedStrings;
    use sdxl_squeeze::coreml::proto::mil_spec::value::{ImmediateValue, immediate_value};
    use sdxl_squeeze::coreml::proto::mil_spec::{TensorValue, ValueType};
    let tensor = TensorType { data_type: DataType::String as i32, ..TensorType::default() };
    let content = Content::Strings(RepeatedStrings { values: vec![name.into()] });
    Value {
        doc_string: String::new(),
        r#type: Some(ValueType { r#type: Some(value_type::Type::TensorType(tensor)) }),
        value: Some(Kind::ImmediateValue(ImmediateValue {
            value: Some(immediate_value::Value::Tensor(TensorValue { value: Some(content) })),
        })),
    }
}

/// The shape of an inline parameter.
fn sizes(op: &mut Operation, parameter: &str) -> Vec<u64> {
    use sdxl_squeeze::coreml::proto::mil_spec::dimension::Dimension;
    let size = |dimension: &Option<Dimension>| match dimension {
        Some(Dimension::Constant(constant)) => constant.size,
        _ => panic!("a dimension that is not fixed"),
    };
    tensor_type(inline(op, parameter)).dimensions.iter().map(|dimension| size(&dimension.dimension)).collect()
}

fn in_manifest() -> Vec<Fault> {
    let items = |package: &mut Package, put: fn(&mut serde_json::Map<String, serde_json::Value>)| {
        package.manifest["itemInfoEntries"]
            .as_object_mut()
            .unwrap()
            .values_mut()
            .for_each(|item| put(item.as_object_mut().unwrap()));
    };
    vec![
        fault("is not there", move |package| {
            items(package, |item| drop(item.insert("path".into(), json!("com.apple.CoreML/nothing"))))
        }),
        fault("is not a path inside the package", move |package| {
            items(package, |item| drop(item.insert("path".into(), json!("../x"))))
        }),
        fault("is not a path inside the package", move |package| {
            items(package, |item| drop(item.insert("path".into(), json!("/etc"))))
        }),
        fault("missing field `name`", move |package| items(package, |item| drop(item.remove("name")))),
        fault("missing field `author`", move |package| items(package, |item| drop(item.remove("author")))),
        fault("there is no item `weights`", move |package| items(package, |item| drop(item.insert("name".into(), json!("x"))))),
        fault("model and weights lie at", move |package| {
            items(package, |item| drop(item.insert("path".into(), json!("com.apple.CoreML"))))
        }),
        fault("`rootModelIdentifier` is none", |package| package.manifest["rootModelIdentifier"] = json!("x")),
        fault("of version `2.0.0`", |package| package.manifest["fileFormatVersion"] = json!("2.0.0")),
    ]
}

/// Puts each fault into the package in turn, written as `path`, and returns those that are not
/// found or not named.
pub(super) fn missed(good: &Package, faults: &[Fault], path: &Path) -> Vec<String> {
    let mut missed = Vec::new();
    for (i, (expected, put)) in faults.iter().enumerate() {
        let mut bad = good.clone();
        put(&mut bad);
        bad.write(path);
        match verify(path) {
            Ok(_) => missed.push(format!("{i}: {expected}: not found")),
            Err(error) => {
                let said = error_chain(&error);
                if !said.contains(expected) || !error.is_bad_input() {
                    missed.push(format!("{i}: {expected}: {said}"));
                }
            }
        }
    }
    missed
}

#[test]
fn each_fault_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let good = good(folder.path());
    let path = folder.path().join("bad.mlpackage");
    good.write(&path);
    verify(&path).unwrap();
    let faults: Vec<Fault> = in_blobs().into_iter().chain(in_program()).chain(in_manifest()).collect();
    let missed = missed(&good, &faults, &path);
    assert!(missed.is_empty(), "{} of {}:\n{}", missed.len(), faults.len(), missed.join("\n"));

    // A package that lacks one of this project's entries is damaged. A package without any of them
    // is taken for another writer's, and only its structure is checked.
    for key in ["model_sha256", "weights_sha256", "unet_config"] {
        let mut other = good.clone();
        let metadata = other.model.description.as_mut().unwrap().metadata.as_mut().unwrap();
        metadata.user_defined.remove(&format!("sdxl-squeeze.{key}")).unwrap();
        other.write(&path);
        let said = verify(&path).unwrap_err().to_string();
        assert!(said.contains(&format!("the metadata is damaged: it lacks `sdxl-squeeze.{key}`")), "{said}");
    }
    let mut other = good.clone();
    other.forget_maker();
    other.write(&path);
    let found = verify(&path).unwrap();
    assert!(!found.hashed && !found.named);
    let said = Squeeze::new("verify").arg(&path).succeeds().text();
    assert!(said.contains("it has no hashes"), "{said}");
}

fn error_chain(error: &Error) -> String {
    let mut said = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        said = format!("{said}: {error}");
        cause = error.source();
    }
    said
}

/// Flips one bit at each of a few hundred places, and cuts files: the result is always an error and
/// never a panic.
#[test]
fn damage_anywhere_is_found() {
    let folder = tempfile::tempdir().unwrap();
    let good = good(folder.path());
    let path = folder.path().join("good.mlpackage");
    let model = good.model.encode_to_vec();
    for i in 0..150usize {
        let at = i.wrapping_mul(0x9e37_79b9) % good.blobs.len();
        let mut blobs = good.blobs.clone();
        blobs[at] ^= 1 << (i % 8);
        std::fs::write(blob_path(&path), &blobs).unwrap();
        assert!(verify(&path).is_err(), "weight.bin, byte {at}");
    }
    std::fs::write(blob_path(&path), &good.blobs).unwrap();
    for i in 0..150usize {
        let at = i.wrapping_mul(0x9e37_79b9) % model.len();
        let mut bytes = model.clone();
        if i % 5 == 4 {
            bytes.truncate(at);
        } else {
            bytes[at] ^= 1 << (i % 8);
        }
        std::fs::write(model_path(&path), &bytes).unwrap();
        assert!(verify(&path).is_err(), "model.mlmodel, byte {at}");
    }
    std::fs::write(model_path(&path), &model).unwrap();
    verify(&path).unwrap();
    for file in [model_path(&path), blob_path(&path), path.join("Manifest.json")] {
        let content = std::fs::read(&file).unwrap();
        std::fs::remove_file(&file).unwrap();
        assert!(verify(&path).unwrap_err().is_bad_input());
        std::fs::write(&file, content).unwrap();
    }
    let said = Squeeze::new("verify").arg(folder.path()).ends_with(2).text();
    assert!(said.contains("Manifest.json"), "{said}");
}
