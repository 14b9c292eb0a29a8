//! Packages with several functions that share their weights: each function is the program of a
//! package of its own.

use std::path::Path;

use sdxl_squeeze::container::Container;
use sdxl_squeeze::coreml::proto::mil_spec::argument::binding::Binding;
use sdxl_squeeze::coreml::proto::mil_spec::value::Value as Kind;
use sdxl_squeeze::coreml::proto::mil_spec::{Function, Value as MilValue};
use sdxl_squeeze::coreml::{FunctionSize, Io, Layout, Options, verify, write};
use sdxl_squeeze::device::Placement;
use sdxl_squeeze::export::coreml_chunks;
use sdxl_squeeze::model::unet::Unet;
use sdxl_squeeze::pipeline::UnetWeights;
use sdxl_squeeze::progress::Silent;
use serde_json::Value;

use super::faults::{Fault, bound, fault, missed};
use super::file::{Package, blob_path, bytes_of};
use super::interpreter::evaluate;
use super::made_up;
use super::write::{prediction, random_inputs};
use crate::squeeze::Squeeze;
use crate::support::{relative_error, repo};

fn size(name: &str, batch: i64, latents: [i64; 2]) -> FunctionSize {
    FunctionSize { name: name.to_owned(), batch, latents }
}

/// Three functions, the default of which is neither the first by name nor the smallest.
fn sizes() -> Vec<FunctionSize> {
    vec![size("middle", 2, [16, 8]), size("small", 1, [8, 8]), size("large", 2, [16, 16])]
}

/// A function whose values in the weight file are replaced by their bytes, so that it can be
/// compared with that of another package.
fn resolved(function: &Function, blobs: &[u8]) -> (Function, Vec<Vec<u8>>) {
    let mut function = function.clone();
    let mut bytes = Vec::new();
    let mut resolve = |value: &mut MilValue| {
        if let Some(Kind::BlobFileValue(_)) = &value.value {
            bytes.push(bytes_of(value, blobs));
            value.value = None;
        }
    };
    for op in &mut function.block_specializations.get_mut("CoreML8").unwrap().operations {
        op.attributes.values_mut().for_each(&mut resolve);
        for argument in op.inputs.values_mut().flat_map(|argument| &mut argument.arguments) {
            if let Some(Binding::Value(value)) = &mut argument.binding {
                resolve(value);
            }
        }
    }
    (function, bytes)
}

/// A container of a small UNet with compressed weights of every kind.
fn base_like(folder: &Path) -> Container {
    let path = folder.join("c.safetensors");
    made_up::container(&repo("tests/golden/base-like"), &path);
    Container::open(&path).unwrap()
}

#[test]
fn each_function_is_the_program_of_its_own_package() {
    let folder = tempfile::tempdir().unwrap();
    for (model, layout, io) in [
        ("base-like", Layout::Linear, Io::Apple),
        ("refiner-like", Layout::SplitEinsum, Io::Diffusers),
        ("v-prediction", Layout::Linear, Io::Diffusers),
    ] {
        let path = folder.path().join(format!("{model}.safetensors"));
        made_up::container(&repo(&format!("tests/golden/{model}")), &path);
        let container = Container::open(&path).unwrap();
        let weights = UnetWeights::from(&container);
        let unet = Unet::resident(weights.chain().unwrap(), weights.source(Placement::CPU), &Silent).unwrap();
        let options = Options { layout, io, tokens: 5, functions: sizes(), ..Options::new(unet.chain().config()) };
        let out = folder.path().join(format!("{model}.mlpackage"));
        let written = write(weights, &options, &out, &Silent).unwrap();
        assert_eq!(written.functions, ["middle", "small", "large"]);
        let found = verify(&out).unwrap();
        assert_eq!((found.hashed, found.named, found.specification), (true, true, 9));
        let names: Vec<&str> = found.functions.iter().map(|function| function.name.as_str()).collect();
        assert_eq!(names, ["middle", "small", "large"]);
        assert_eq!((&found.inputs, &found.outputs), (&found.functions[0].inputs, &found.functions[0].outputs));
        assert!(found.functions[1].inputs[0].ends_with("[1, 4, 8, 8]"), "{:?}", found.functions[1].inputs);
        let package = Package::read(&out);
        let description = package.model.description.as_ref().unwrap();
        assert_eq!(description.default_function_name, "middle");
        assert!(description.input.is_empty() && description.output.is_empty());
        let mut smallest = u64::MAX;
        for FunctionSize { name, batch, latents } in sizes() {
            let alone = Options { batch, latents, functions: Vec::new(), ..options.clone() };
            let single = folder.path().join("single.mlpackage");
            std::fs::remove_dir_all(&single).ok();
            smallest = smallest.min(write(weights, &alone, &single, &Silent).unwrap().weight_bytes);
            let mut single = Package::read(&single);
            let mut function = package.only(&name);
            let [ours, theirs] = [&mut function, &mut single].map(|package| {
                let blobs = package.blobs.clone();
                resolved(&package.program().functions["main"], &blobs)
            });
            assert!(ours.0 == theirs.0, "{model}: the operations of {name} differ");
            assert!(ours.1 == theirs.1, "{model}: the weights of {name} differ");
            let inputs = random_inputs(&mut single);
            let made = evaluate(&mut function, &inputs).remove("noise_pred").unwrap();
            let error = relative_error(&made, &prediction(unet.chain(), &unet, &alone, &inputs));
            assert!(error < 1e-4, "{model} {name}: {error}");
        }
        // The weights are there once: the file is that of one function, but for what depends on the
        // size.
        assert!((smallest..smallest + 1024).contains(&written.weight_bytes), "{smallest}: {}", written.weight_bytes);
    }
}

/// Both at once: two packages with the same functions each.
#[test]
fn chunks_can_have_several_functions() {
    let folder = tempfile::tempdir().unwrap();
    let container = base_like(folder.path());
    let weights = UnetWeights::from(&container);
    let options = Options { functions: sizes(), ..Options::new(weights.chain().unwrap().config()) };
    let out = folder.path().join("chunks");
    coreml_chunks(weights, &options, &out, &Silent).unwrap();
    let chunks = ["UnetChunk1", "UnetChunk2"].map(|name| out.join(format!("{name}.mlpackage")));
    let [first, second] = chunks.map(|path| verify(&path).unwrap());
    assert!(first.named && second.named);
    for (passing, passed) in first.functions.iter().zip(&second.functions) {
        assert_eq!(passing.name, passed.name);
        assert!(passing.outputs.iter().all(|output| passed.inputs.contains(output)), "{passing:?} {passed:?}");
    }
    assert!(first.functions[0].outputs[0].contains("[2, "), "{:?}", first.functions[0].outputs);
    assert!(first.functions[1].outputs[0].contains("[1, "), "{:?}", first.functions[1].outputs);
}

#[test]
fn the_same_functions_have_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let container = base_like(folder.path());
    let weights = UnetWeights::from(&container);
    let options = Options { functions: sizes(), ..Options::new(weights.chain().unwrap().config()) };
    let [first, second] = ["a.mlpackage", "b.mlpackage"].map(|name| {
        let out = folder.path().join(name);
        write(weights, &options, &out, &Silent).unwrap();
        let files = [out.join("Manifest.json"), super::file::model_path(&out), blob_path(&out)];
        files.map(|file| std::fs::read(file).unwrap())
    });
    assert!(first == second);
    let refused = |functions: Vec<FunctionSize>, expected: &str| {
        let out = folder.path().join("c.mlpackage");
        let said = write(weights, &Options { functions, ..options.clone() }, &out, &Silent).unwrap_err().to_string();
        assert!(said.contains(expected) && !out.exists(), "{said}");
    };
    refused(vec![size("a", 2, [8, 8])], "a package with one function calls it `main`");
    refused(vec![size("a", 2, [8, 8]), size("a", 1, [8, 8])], "`a` and `a` have one name or one size");
    refused(vec![size("a", 2, [8, 8]), size("b", 2, [8, 8])], "`a` and `b` have one name or one size");
    refused(vec![size("a", 2, [8, 8]), size("1b", 1, [8, 8])], "`1b` is no name of a function");
    refused(vec![size("a", 2, [8, 8]), size("b.c", 1, [8, 8])], "`b.c` is no name of a function");
    refused(vec![size("a", 2, [8, 8]), size("b", 1, [8, 6])], "the size of the latents is 6");
}

#[test]
fn export_writes_a_function_for_each_size() {
    let folder = tempfile::tempdir().unwrap();
    let container = folder.path().join("c.safetensors");
    made_up::container(&repo("tests/golden/base-like"), &container);
    let export = |name: &str, more: &[&str]| {
        let run = Squeeze::new("export").arg(&container).args(["--to", "coreml", "--io", "apple"]).args(more);
        run.out(folder.path().join(name))
    };
    let said = export("a.mlpackage", &["--height", "64,128", "--batch", "1,2"]).succeeds().text();
    let expected =
        "4 functions share the weights: h64_w64_b2 (the default), h64_w64_b1, h128_w128_b1, h128_w128_b2; iOS 18 or macOS 15\n";
    assert!(said.contains(expected), "{said}");
    let said = Squeeze::new("verify").arg(folder.path().join("a.mlpackage")).succeeds().text();
    for part in [
        "function h64_w64_b2, the default\nin  sample: fp16 [2, 4, 8, 8]\n",
        "function h128_w128_b1\nin  sample: fp16 [1, 4, 16, 16]\n",
    ] {
        assert!(said.contains(part), "{said}");
    }
    export("b.mlpackage", &["--height", "64,128", "--width", "128,64"]).succeeds();
    let found = verify(&folder.path().join("b.mlpackage")).unwrap();
    let names: Vec<&str> = found.functions.iter().map(|function| function.name.as_str()).collect();
    assert_eq!(names, ["h64_w128_b2", "h128_w64_b2"]);
    let json = export("c.mlpackage", &["--width", "64,128", "--json"]).succeeds().stdout;
    let json: Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json["functions"], serde_json::json!(["h64_w64_b2", "h128_w128_b2"]));

    export("d.mlpackage", &["--height", "64,128", "--width", "64"]).is_refused(&["--height has 2 sizes and --width 1"]);
    export("d.mlpackage", &["--height", "64,64"]).is_refused(&["have one name or one size"]);
    export("d.mlpackage", &["--height", "64,100"]).is_refused(&["height 100 is not a multiple of 8"]);
    let model = repo("tests/golden/base-like");
    let part = Squeeze::new("export").arg(&model).args(["--to", "coreml", "--part", "vae_decoder", "--height", "64,128"]);
    part.out(folder.path().join("d.mlpackage")).is_refused(&["several sizes are for"]);
    let bundle = Squeeze::new("bundle").model(&model).args(["--height", "64,128"]);
    bundle.out(folder.path().join("d")).is_refused(&["several sizes are for"]);
    assert!(!folder.path().join("d.mlpackage").exists() && !folder.path().join("d").exists());
}

/// The check also accepts functions that coremltools put into one package.
#[test]
fn functions_by_coremltools_are_whole() {
    let found = verify(&repo("tests/golden/coreml/functions-by-coremltools.mlpackage")).unwrap();
    assert_eq!((found.hashed, found.named, found.functions.len()), (false, false, 2));
    assert_eq!(found.functions[0].name, "large");
    assert_eq!(found.outputs, ["made: fp16 [1, 16, 16, 16]"]);
    assert_eq!(found.functions[1].outputs, ["made: fp16 [1, 16, 8, 8]"]);
}

fn faults() -> Vec<Fault> {
    let functions = |package: &mut Package| {
        let description = package.model.description.as_mut().unwrap();
        (std::mem::take(&mut description.functions), std::mem::take(&mut description.default_function_name))
    };
    vec![
        fault("the program's functions are [\"large\", \"middle\", \"small\"], not [\"main\"]", move |package| {
            drop(functions(package))
        }),
        fault("the default function is `middle`, but no functions are described", move |package| {
            let (_, default) = functions(package);
            package.model.description.as_mut().unwrap().default_function_name = default;
        }),
        fault("the default function `main` is none of", |package| {
            package.model.description.as_mut().unwrap().default_function_name = "main".into();
        }),
        fault("the default function `` is none of", |package| {
            package.model.description.as_mut().unwrap().default_function_name = String::new();
        }),
        fault("beside those of its functions", |package| {
            let description = package.model.description.as_mut().unwrap();
            description.input = description.functions[0].input.clone();
        }),
        fault("not [\"middle\", \"small\"]", |package| drop(package.model.description.as_mut().unwrap().functions.pop())),
        fault("not [\"large\", \"large\", \"middle\"]", |package| {
            package.model.description.as_mut().unwrap().functions[1].name = "large".into();
        }),
        fault("the program's functions are [\"large\", \"middle\"]", |package| drop(package.program().functions.remove("small"))),
        fault("function `small`: the description's inputs", |package| {
            let functions = &mut package.model.description.as_mut().unwrap().functions;
            functions[1].input = functions[0].input.clone();
        }),
        fault("function `large`: the description's outputs", |package| {
            drop(package.model.description.as_mut().unwrap().functions[2].output.pop())
        }),
        fault("function `large`: the operator set is `CoreML7`", |package| {
            package.program().functions.get_mut("large").unwrap().opset = "CoreML7".into();
        }),
        fault("function `large`: `conv_in` (conv): reads `nothing`", |package| {
            let operations = &mut block(package, "large").operations;
            let conv = operations.iter_mut().find(|op| op.outputs[0].name == "conv_in").unwrap();
            *bound(conv, "x") = "nothing".into();
        }),
        fault("function `small`: there is no `conv_in_weight`", |package| {
            let operations = &mut block(package, "small").operations;
            operations.iter_mut().find(|op| op.outputs[0].name == "conv_in_weight").unwrap().outputs[0].name = "weight".into();
            let conv = operations.iter_mut().find(|op| op.outputs[0].name == "conv_in").unwrap();
            *bound(conv, "weight") = "weight".into();
        }),
        // A function has the weight of another layer, which has the same shape.
        fault("is not the record that it is in the function `middle`", |package| {
            let operations = &mut block(package, "small").operations;
            let offset = |value: &MilValue| match &value.value {
                Some(Kind::BlobFileValue(place)) => place.offset,
                _ => panic!("not in the weight file"),
            };
            let [norm, other] = ["up_blocks_1_attentions_0_norm_weight", "up_blocks_1_attentions_0_norm_bias"];
            let other = offset(&operations.iter().find(|op| op.outputs[0].name == other).unwrap().attributes["val"]);
            let norm = operations.iter_mut().find(|op| op.outputs[0].name == norm).unwrap();
            let Some(Kind::BlobFileValue(place)) = &mut norm.attributes.get_mut("val").unwrap().value else { panic!() };
            place.offset = other;
        }),
        // Only the hash of the program reveals this one: another function is the default.
        fault("the program is damaged", |package| {
            package.model.description.as_mut().unwrap().default_function_name = "small".into();
        }),
    ]
}

/// The block of a function.
fn block<'a>(package: &'a mut Package, name: &str) -> &'a mut sdxl_squeeze::coreml::proto::mil_spec::Block {
    package.program().functions.get_mut(name).unwrap().block_specializations.get_mut("CoreML8").unwrap()
}

#[test]
fn each_fault_of_a_function_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let container = base_like(folder.path());
    let weights = UnetWeights::from(&container);
    let options = Options { functions: sizes(), ..Options::new(weights.chain().unwrap().config()) };
    let out = folder.path().join("good.mlpackage");
    write(weights, &options, &out, &Silent).unwrap();
    let found = missed(&Package::read(&out), &faults(), Path::new(&folder.path().join("bad.mlpackage")));
    assert!(found.is_empty(), "{}:\n{}", found.len(), found.join("\n"));
}
