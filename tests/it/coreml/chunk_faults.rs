//! Faults in the two chunks of a UNet that are otherwise good. Each of them must be found and
//! named.

use std::path::Path;

use sdxl_squeeze::container::Container;
use sdxl_squeeze::coreml::{Options, verify};
use sdxl_squeeze::export::{CHUNKS, coreml_chunks};
use sdxl_squeeze::pipeline::UnetWeights;
use sdxl_squeeze::progress::Silent;

use super::faults::{Fault, bound, dimension, fault, missed, output_type};
use super::file::Package;
use super::made_up;
use crate::support::repo;

/// The entry of a chunk in the metadata.
fn entry(package: &mut Package) -> &mut String {
    let metadata = package.model.description.as_mut().unwrap().metadata.as_mut().unwrap();
    metadata.user_defined.get_mut("sdxl-squeeze.chunk").unwrap()
}

/// Renames a value everywhere: the operation that makes it, the operations that read it, inputs,
/// outputs and the description.
fn rename(package: &mut Package, old: &str, new: &str) {
    let function = package.program().functions.get_mut("main").unwrap();
    function.inputs.iter_mut().filter(|input| input.name == old).for_each(|input| input.name = new.to_owned());
    let block = function.block_specializations.get_mut("CoreML8").unwrap();
    block.outputs.iter_mut().filter(|output| *output == old).for_each(|output| *output = new.to_owned());
    for op in &mut block.operations {
        op.outputs.iter_mut().filter(|output| output.name == old).for_each(|output| output.name = new.to_owned());
        let names: Vec<String> = op.inputs.keys().cloned().collect();
        for parameter in names {
            use sdxl_squeeze::coreml::proto::mil_spec::argument::binding::Binding;
            for binding in &mut op.inputs.get_mut(&parameter).unwrap().arguments {
                match &mut binding.binding {
                    Some(Binding::Name(name)) if name == old => *name = new.to_owned(),
                    _ => {}
                }
            }
        }
    }
    let description = package.model.description.as_mut().unwrap();
    let features = description.input.iter_mut().chain(&mut description.output);
    features.filter(|feature| feature.name == old).for_each(|feature| feature.name = new.to_owned());
}

/// Removes an output.
fn remove_output(package: &mut Package, at: usize) {
    package.block().outputs.remove(at);
    package.model.description.as_mut().unwrap().output.remove(at);
}

/// Swaps two inputs.
fn swap_inputs(package: &mut Package, a: usize, b: usize) {
    package.program().functions.get_mut("main").unwrap().inputs.swap(a, b);
    package.model.description.as_mut().unwrap().input.swap(a, b);
}

/// The number of outputs of the first chunk that skip connections are.
fn outputs(package: &mut Package) -> usize {
    package.block().outputs.len()
}

fn in_either() -> Vec<Fault> {
    vec![
        fault("`sdxl-squeeze.chunk`: missing field `parts`", |package| *entry(package) = r#"{"number":1,"of":2}"#.into()),
        fault("`sdxl-squeeze.chunk`: unknown field", |package| *entry(package) = entry(package).replace("\"of\"", "\"off\"")),
        fault("not 1 of 3", |package| *entry(package) = entry(package).replace("\"of\":2", "\"of\":3").replace(":2,", ":1,")),
        fault("are not consecutive parts of this UNet", |package| {
            *entry(package) =
                entry(package).replace("down_blocks.1\"", "down_blocks.7\"").replace("up_blocks.1\"", "up_blocks.7\"");
        }),
        fault("are not consecutive parts of this UNet", |package| {
            *entry(package) = r#"{"number":1,"of":2,"parts":[]}"#.into();
        }),
        fault("neither begin nor end this UNet alone", |package| {
            *entry(package) = r#"{"number":1,"of":2,"parts":["down_blocks.1"]}"#.into();
        }),
        // Without the entry the package would be a whole UNet, whose weights it lacks.
        fault("there is no `", |package| {
            let metadata = package.model.description.as_mut().unwrap().metadata.as_mut().unwrap();
            metadata.user_defined.remove("sdxl-squeeze.chunk").unwrap();
        }),
        fault("`sdxl-squeeze.layout` names no layout", |package| {
            let metadata = package.model.description.as_mut().unwrap().metadata.as_mut().unwrap();
            metadata.user_defined.insert("sdxl-squeeze.layout".into(), "round".into());
        }),
        // Only the hash of the program reveals this one.
        fault("the program is damaged", |package| {
            package.model.description.as_mut().unwrap().metadata.as_mut().unwrap().short_description = "Chunk 2".into();
        }),
    ]
}

fn in_first() -> Vec<Fault> {
    vec![
        fault("are not what this chunk passes on", |package| remove_output(package, 0)),
        fault("are not what this chunk passes on", |package| {
            let last = outputs(package) - 1;
            remove_output(package, last);
        }),
        fault("are not what this chunk passes on", |package| rename(package, "silu_temb", "embedding")),
        fault("are not what this chunk passes on", |package| {
            rename(package, "down_block_res_samples_0", "other");
            rename(package, "down_block_res_samples_1", "down_block_res_samples_0");
            rename(package, "other", "down_block_res_samples_1");
        }),
        fault("the inputs do not begin with those that this chunk reads", |package| rename(package, "time_ids", "ids")),
        fault("the chunk has neither latents nor a prediction", |package| rename(package, "sample", "latents")),
        fault("the size of the latents is 10", |package| {
            // All sizes of the image change, and so do the declared types of what is computed from
            // it.
            let function = package.program().functions.get_mut("main").unwrap();
            let mut named = function.inputs[0].clone();
            assert_eq!(named.name, "sample");
            set_size(&mut named, 2, 10);
            function.inputs[0] = named;
            let operations = &mut package.block().operations;
            operations
                .retain(|op| !op.inputs.values().any(|argument| reads(argument, "sample")) || op.outputs[0].name == "conv_in");
            dimension(output_type(package.named("conv_in")), 2, 10);
            cut_after_conv_in(package);
        }),
        fault("there is no `conv_in_weight`", |package| rename(package, "conv_in_weight", "weight")),
    ]
}

/// Whether an argument reads the value `name`.
fn reads(argument: &sdxl_squeeze::coreml::proto::mil_spec::Argument, name: &str) -> bool {
    use sdxl_squeeze::coreml::proto::mil_spec::argument::binding::Binding;
    argument.arguments.iter().any(|binding| matches!(&binding.binding, Some(Binding::Name(read)) if read == name))
}

fn set_size(value: &mut sdxl_squeeze::coreml::proto::mil_spec::NamedValueType, at: usize, size: u64) {
    use sdxl_squeeze::coreml::proto::mil_spec::value_type;
    let Some(value_type::Type::TensorType(tensor)) = &mut value.r#type.as_mut().unwrap().r#type else { panic!() };
    dimension(tensor, at, size);
}

/// Leaves the program until `conv_in`, whose output becomes its only one.
fn cut_after_conv_in(package: &mut Package) {
    let operations = &mut package.block().operations;
    let at = operations.iter().position(|op| op.outputs[0].name == "conv_in").unwrap();
    operations.truncate(at + 1);
    package.block().outputs = vec!["conv_in".into()];
    let (shape, output) = {
        let op = package.named("conv_in").clone();
        (super::file::declared(op.outputs[0].r#type.as_ref()).1, op.outputs[0].name.clone())
    };
    let description = package.model.description.as_mut().unwrap();
    description.output.truncate(1);
    description.output[0].name = output;
    set_feature(&mut description.output[0], shape, 65552);
    let shape = super::file::declared(package.program().functions["main"].inputs[0].r#type.as_ref()).1;
    set_feature(&mut package.model.description.as_mut().unwrap().input[0], shape, 65552);
}

fn set_feature(feature: &mut sdxl_squeeze::coreml::proto::specification::FeatureDescription, shape: Vec<i64>, data_type: i32) {
    use sdxl_squeeze::coreml::proto::specification::feature_type;
    let Some(feature_type::Type::MultiArrayType(array)) = &mut feature.r#type.as_mut().unwrap().r#type else { panic!() };
    (array.shape, array.data_type) = (shape, data_type);
}

fn in_second() -> Vec<Fault> {
    vec![
        fault("are not what this chunk is passed", |package| rename(package, "silu_temb", "embedding")),
        fault("are not what this chunk is passed", |package| {
            let last = package.program().functions["main"].inputs.len() - 1;
            swap_inputs(package, last, last - 1);
        }),
        fault("the inputs do not begin with those that this chunk reads", |package| swap_inputs(package, 0, 1)),
        fault("the inputs do not begin with those that this chunk reads", |package| {
            rename(package, "encoder_hidden_states", "text");
        }),
        fault("are not what this chunk is passed", |package| {
            // The embedding comes in fp16, without the cast.
            let array = package.named("silu_temb_fp16").outputs[0].r#type.clone();
            let function = package.program().functions.get_mut("main").unwrap();
            let input = function.inputs.iter_mut().find(|input| input.name == "silu_temb").unwrap();
            input.r#type = array;
            let operations = &mut package.block().operations;
            operations.retain(|op| op.outputs[0].name != "silu_temb_fp16");
            let shape = {
                let inputs = &package.program().functions["main"].inputs;
                let input = inputs.iter().find(|input| input.name == "silu_temb").unwrap();
                super::file::declared(input.r#type.as_ref()).1
            };
            rename(package, "silu_temb_fp16", "silu_temb");
            let features = &mut package.model.description.as_mut().unwrap().input;
            set_feature(features.iter_mut().find(|feature| feature.name == "silu_temb").unwrap(), shape, 65552);
        }),
        fault("the chunk has neither latents nor a prediction", |package| rename(package, "noise_pred", "noise")),
        // A second output would be what Swift takes.
        fault("are not what this chunk makes: noise_pred: fp32", |package| {
            let mut other = package.named("noise_pred").clone();
            other.outputs[0].name = "again".into();
            package.block().operations.push(other);
            package.block().outputs.push("again".into());
            let outputs = &mut package.model.description.as_mut().unwrap().output;
            let mut again = outputs[0].clone();
            again.name = "again".into();
            outputs.push(again);
        }),
        fault("is not used by `conv_out` alone", |package| {
            let mut copy = package.named("conv_out").clone();
            copy.outputs[0].name = "again".into();
            let operations = &mut package.block().operations;
            let at = operations.iter().position(|op| op.outputs[0].name == "conv_out").unwrap();
            operations.insert(at, copy);
        }),
        // A weight of the first chunk in the second one.
        fault("the weight `extra` is not of this UNet", |package| {
            let mut weight = package.named("conv_norm_out_weight").clone();
            weight.outputs[0].name = "extra".into();
            let mut norm = package.named("conv_norm_out").clone();
            norm.outputs[0].name = "again".into();
            *bound(&mut norm, "gamma") = "extra".into();
            *bound(&mut norm, "beta") = "extra".into();
            let operations = &mut package.block().operations;
            let at = operations.iter().position(|op| op.outputs[0].name == "conv_norm_out").unwrap();
            operations.insert(at, weight);
            operations.insert(at + 2, norm);
        }),
    ]
}

/// The two chunks of a container with weights of every kind.
fn good(folder: &Path) -> [Package; 2] {
    let path = folder.join("c.safetensors");
    made_up::container(&repo("tests/golden/base-like"), &path);
    let container = Container::open(&path).unwrap();
    let chain = UnetWeights::from(&container).chain().unwrap();
    let out = folder.join("chunks");
    coreml_chunks(UnetWeights::Container(&container), &Options::new(chain.config()), &out, &Silent).unwrap();
    CHUNKS.map(|name| {
        let path = out.join(format!("{name}.mlpackage"));
        assert!(verify(&path).unwrap().named);
        Package::read(&path)
    })
}

#[test]
fn each_fault_of_a_chunk_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("bad.mlpackage");
    let [first, second] = good(folder.path());
    let of_each = [(&first, [in_either(), in_first()]), (&second, [in_either(), in_second()])];
    let missed = |(good, faults): &(&Package, [Vec<Fault>; 2])| {
        faults.iter().flat_map(|faults| missed(good, faults, &path)).collect::<Vec<_>>()
    };
    let found: Vec<String> = of_each.iter().flat_map(missed).collect();
    assert!(found.is_empty(), "{}:\n{}", found.len(), found.join("\n"));
}
