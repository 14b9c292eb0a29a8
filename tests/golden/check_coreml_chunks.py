"""Checks a UNet in two Core ML packages, and packages with several functions, without any of the Rust code.

    python check_coreml_chunks.py chunks WHOLE.mlpackage FOLDER --weights CONTAINER|MODELDIR
    python check_coreml_chunks.py functions PACKAGE --weights CONTAINER|MODELDIR
    python check_coreml_chunks.py --all SDXL-SQUEEZE OUT.json [--models NAME…]     # the models of this repository and small random ones

chunks: each package as check_coreml.py does (Apple's validator, coremltools' loader, types inferred as
declared); each tensor of the UNet is in one of the two, and equals the stored tensor bit for bit; the
first and then the second, fed as Apple's Swift pipeline feeds them, make what the whole package makes
and what diffusers' UNet makes, within 1e-4 in fp32. The file of weights is no larger than the whole's.

functions: every function of a package, as check_coreml.py does; all of them read the same records.
"""

import argparse
import json
import pathlib
import shutil
import subprocess
import sys
import tempfile

import torch
from check_coreml import Stored, forward, loader, materialized, prediction, random_inputs, values
from mil_torch import Package, evaluate

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
NAMES = ["UnetChunk1", "UnetChunk2"]
KINDS = {"linear, diffusers": [], "split-einsum, apple": ["--layout", "split-einsum", "--io", "apple"]}
FUNCTIONS = {
    "linear, diffusers": ["--height", "64", "--width", "128", "--batch", "1,2"],
    "split-einsum, apple": ["--height", "64,128", "--width", "128,64"],
}
ARCHITECTURES = ["ssd-like", "koala-like", "lcm-like", "inpainting-like", "edit-like"]


def weight_bytes(path):
    return (path / "Data/com.apple.CoreML/weights/weight.bin").stat().st_size


def in_turn(packages, inputs, half=False):
    """What the last package makes, each fed with the UNet's inputs and the outputs of the one before (Unet.swift)."""
    made = {}
    for package in packages:
        assert not set(made) & set(inputs), "an output would replace an input"
        given = inputs | made
        made = evaluate(package, {name: given[name] for name in package.inputs}, half)
    assert list(made) == ["noise_pred"], list(made)
    return made["noise_pred"]


def chunks(whole, folder, stored):
    paths = [folder / f"{name}.mlpackage" for name in NAMES]
    found, seen = {}, []
    for path in paths:
        program, row = loader(path)
        seen.append(materialized(program, stored))
        found[path.stem] = row | {"tensors_equal_bit_for_bit": len(seen[-1]), "weight_bytes": weight_bytes(path)}
    assert not set(seen[0]) & set(seen[1]), "a tensor is in both packages"
    assert sorted(seen[0] + seen[1]) == sorted(stored.names), "a tensor is in neither package"
    first, second = packages = [Package(path) for path in paths]
    assert {"sample", "time_ids"} <= set(first.inputs), first.inputs
    passed = {output.name: first.type(output.type) for op in first.block.operations for output in op.outputs if output.name in first.block.outputs}
    assert all(kind == "FLOAT32" for kind, _ in passed.values()), passed
    assert {name: second.inputs[name] for name in passed} == passed, (passed, second.inputs)
    # Padding and the zeros that layers without a bias share are all that two files have more than one.
    more = sum(map(weight_bytes, paths)) - weight_bytes(whole)
    assert more < 64 * 1024, f"{more} bytes more than in one package"
    single = Package(whole)
    inputs = random_inputs(single)
    with torch.no_grad():
        wanted = prediction(stored, inputs, apple=len(inputs["encoder_hidden_states"].shape) == 4)
        error = lambda made, of: float((made - of).double().norm() / of.double().norm())
        made = in_turn(packages, inputs)
        found |= {
            "passed_on": {name: list(shape) for name, (_, shape) in passed.items()},
            "relative_error_to_the_whole": error(made, evaluate(single, inputs)["noise_pred"]),
            "relative_error_fp32": float(f"{error(made, wanted):.2g}"),
            "relative_error_fp16": float(f"{error(in_turn(packages, inputs, half=True), wanted):.2g}"),
        }
    assert found["relative_error_to_the_whole"] < 1e-6 and found["relative_error_fp32"] < 1e-4, found
    assert found["relative_error_fp16"] < 3e-2, found
    return found


def records(package):
    """The offsets in weight.bin that a function reads."""
    found = set()
    for op in package.block.operations:
        inline = [binding.value for argument in op.inputs.values() for binding in argument.arguments if binding.WhichOneof("binding") == "value"]
        for value in [*op.attributes.values(), *inline]:
            if value.WhichOneof("value") == "blobFileValue":
                found.add(value.blobFileValue.offset)
    return found


def functions(path, stored):
    description = Package(path).model.description
    names = [function.name for function in description.functions]
    assert description.defaultFunctionName == names[0] and not description.input and not description.output
    assert Package(path).model.specificationVersion == 9
    found = {"default": names[0], "weight_bytes": weight_bytes(path)}
    offsets = []
    for name in names:
        program, row = loader(path, name)
        package = Package(path, name)
        found[name] = row | values(program, stored, name) | forward(package, stored)
        found[name]["sample"] = list(package.inputs["sample"][1])
        offsets.append(records(package))
    assert all(other == offsets[0] for other in offsets), "a function has a record of its own"
    return found


def run(*arguments):
    subprocess.run(list(map(str, arguments)), check=True, stdout=subprocess.DEVNULL)


def check(squeeze, source, folder):
    """Chunks in both kinds, functions of two batches in the one kind and of two sizes in the other."""
    found = {}
    stored = Stored(source)
    for kind, options in KINDS.items():
        if "apple" in kind and stored.config["in_channels"] != stored.config["out_channels"] or "apple" in kind and stored.config.get("time_cond_proj_dim"):
            options = options[:2]
        at = pathlib.Path(tempfile.mkdtemp(dir=folder))
        export = [squeeze, "export", source, "--to", "coreml", *options]
        run(*export, "--out", at / "whole.mlpackage")
        run(*export, "--chunks", "2", "--out", at / "chunks")
        run(*export, *FUNCTIONS[kind], "--out", at / "functions.mlpackage")
        for package in [at / "functions.mlpackage", *(at / "chunks" / f"{name}.mlpackage" for name in NAMES)]:
            run(squeeze, "verify", package)
        found[f"chunks, {kind}"] = chunks(at / "whole.mlpackage", at / "chunks", stored)
        found[f"functions, {kind}"] = functions(at / "functions.mlpackage", stored)
        print(source, kind, found[f"chunks, {kind}"], found[f"functions, {kind}"], flush=True)
    return found


def sources(folder):
    """The models by name. A UNet of another architecture gets the rest of its pipeline from base-like."""
    # What `cargo test coreml` leaves behind: weights of every kind.
    yield "base-like, weights of every kind", lambda: ROOT / "target/tmp/coreml/c.safetensors"
    for model in [ROOT / "models/emoji-sdxl", HERE / "base-like", HERE / "refiner-like", HERE / "v-prediction"]:
        yield f"{model.name}, dense fp16", lambda model=model: model
    for name in ARCHITECTURES:

        def pipeline(name=name):
            model = folder / name
            shutil.copytree(HERE / "base-like", model, ignore=shutil.ignore_patterns("unet"))
            shutil.copytree(HERE / "architectures" / name / "unet", model / "unet")
            return model

        yield f"{name}, dense fp16", pipeline


def check_all(squeeze, out, chosen):
    """Checks all models, or those whose names begin with one of `chosen`; the results of others stay in the file."""
    out = pathlib.Path(out)
    found = json.loads(out.read_text()) if chosen and out.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        for name, source in sources(pathlib.Path(folder)):
            if not chosen or name.startswith(tuple(chosen)):
                found[name] = check(squeeze, source(), folder)
                out.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("what", nargs="?", choices=["chunks", "functions"])
    parser.add_argument("paths", nargs="*", type=pathlib.Path)
    parser.add_argument("--weights")
    parser.add_argument("--all", nargs=2, metavar=("SDXL-SQUEEZE", "OUT"))
    parser.add_argument("--models", nargs="*", metavar="NAME", help="for --all: the beginnings of the models' names [default: all]")
    args = parser.parse_args()
    if args.all:
        return check_all(pathlib.Path(args.all[0]).resolve(), args.all[1], args.models)
    stored = Stored(args.weights)
    print(json.dumps({"chunks": chunks, "functions": functions}[args.what](*args.paths, stored), indent=1))


if __name__ == "__main__":
    sys.exit(main())
