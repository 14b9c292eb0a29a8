"""Checks a UNet in two Core ML packages, and packages with several functions, without any of the Rust code.

    python check_coreml_chunks.py chunks WHOLE.mlpackage FOLDER --weights CONTAINER|MODELDIR [--model MODELDIR]
    python check_coreml_chunks.py functions PACKAGE --weights CONTAINER|MODELDIR [--model MODELDIR]
    python check_coreml_chunks.py --all SDXL-SQUEEZE OUT.json [--models NAME…]     # the models of this repository and small random ones

chunks: each package as check_coreml.py does (Apple's validator, coremltools' loader, types inferred as
declared); each tensor of the UNet is in one of the two, and equals the stored tensor bit for bit; the
first and then the second, fed as Apple's Swift pipeline feeds them, make what the whole package makes
and what diffusers' UNet makes, within 1e-4 in fp32. The file of weights is no larger than the whole's.

functions: every function of a package, as check_coreml.py does; all of them read the same records.

--all: models of every architecture, dense and with compressed weights, in both layouts. Each package
also passes `verify`, and each function is, operation for operation and value for value, the program of
a package of its own. A package that misses is in the file with what it missed, and the script then
ends with code 1.
"""

import argparse
import hashlib
import json
import pathlib
import re
import shutil
import struct
import subprocess
import sys
import tempfile

import torch
from check_coreml import Stored, expected, forward, loader, materialized, random_inputs, values
from coremltools.proto import MIL_pb2
from mil_torch import Package, evaluate

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
NAMES = ["UnetChunk1", "UnetChunk2"]
KINDS = {"linear, diffusers": [], "split-einsum, apple": ["--layout", "split-einsum", "--io", "apple"]}
FUNCTIONS = {
    "linear": ["--height", "64", "--width", "128", "--batch", "1,2"],
    "split-einsum": ["--height", "64,128", "--width", "128,64"],
}
MODELS = [ROOT / "models/emoji-sdxl", HERE / "base-like", HERE / "refiner-like", HERE / "v-prediction"]
# Needs no calibration.
CONFIG = "configs/magnitude-s40-4bit-gs16.yaml"
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
        wanted = expected(stored, inputs)
        error = lambda made, of: float((made - of).double().norm() / of.double().norm())
        made = in_turn(packages, inputs)
        found |= {
            "passed_on": len(passed),
            "second_also_reads": [name for name in second.inputs if name not in passed],
            "relative_error_to_the_whole": error(made, evaluate(single, inputs)["noise_pred"]),
            "relative_error_fp32": float(f"{error(made, wanted):.2g}"),
            "relative_error_fp16": float(f"{error(in_turn(packages, inputs, half=True), wanted):.2g}"),
        }
    assert found["relative_error_to_the_whole"] == 0 and found["relative_error_fp32"] < 1e-4, found
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


def operations(package):
    """The operations of a function, in which the bytes of values stand for their places in weight.bin."""
    found = []
    for op in package.block.operations:
        op = MIL_pb2.Operation.FromString(op.SerializeToString())
        inline = [binding.value for argument in op.inputs.values() for binding in argument.arguments if binding.WhichOneof("binding") == "value"]
        for value in [*op.attributes.values(), *inline]:
            if value.WhichOneof("value") == "blobFileValue":
                size, start = struct.unpack_from("<QQ", bytes(package.weights[value.blobFileValue.offset :][:64]), 8)
                value.blobFileValue.fileName = hashlib.sha256(package.weights[start : start + size]).hexdigest()
                value.blobFileValue.offset = 0
        found.append(op.SerializeToString(deterministic=True))
    return found


def run(*arguments):
    done = subprocess.run(list(map(str, arguments)), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0, f"{arguments[1]}: {done.stderr}"


def singles(export, path, folder):
    """Checks that each function is the program of its own package."""
    for function in Package(path).model.description.functions:
        height, width, batch = re.fullmatch(r"h(\d+)_w(\d+)_b(\d+)", function.name).groups()
        out = folder / f"{function.name}.mlpackage"
        run(*export, "--height", height, "--width", width, "--batch", batch, "--out", out)
        assert operations(Package(path, function.name)) == operations(Package(out)), f"{function.name} is not the program of its own package"
    return {"each_is_the_program_of_its_own_package": True}


def check(squeeze, source, model, folder):
    """Chunks in both kinds, functions of two batches in the one kind and of two sizes in the other; `model` is the container's."""
    found = {}
    stored = Stored(source, model)
    for kind, options in KINDS.items():
        if "apple" in kind and (stored.config["in_channels"] != stored.config["out_channels"] or stored.config.get("time_cond_proj_dim")):
            kind, options = kind.replace("apple", "diffusers"), options[:2]
        layout = kind.split(",")[0]
        at = pathlib.Path(tempfile.mkdtemp(dir=folder))
        export = [squeeze, "export", source, "--to", "coreml", *options, *(["--model", model] if model else [])]
        whole, chunked, several = at / "whole.mlpackage", at / "chunks", at / "functions.mlpackage"

        def two():
            run(*export, "--out", whole)
            run(*export, "--chunks", "2", "--out", chunked)
            for name in NAMES:
                run(squeeze, "verify", chunked / f"{name}.mlpackage")
            return chunks(whole, chunked, stored)

        def many():
            run(*export, *FUNCTIONS[layout], "--out", several)
            run(squeeze, "verify", several)
            return singles(export, several, at) | functions(several, stored)

        for what, job in {"chunks": two, "functions": many}.items():
            try:
                found[f"{what}, {kind}"] = job()
            except AssertionError as miss:
                found[f"{what}, {kind}"] = {"missed": str(miss)}
            print(source, what, kind, found[f"{what}, {kind}"], flush=True)
        shutil.rmtree(at)
    return found


def sources(folder, squeeze):
    """The models by name: a function that makes the source, and for a container its model, or None. A UNet of
    another architecture gets the rest of its pipeline from base-like."""
    # What `cargo test coreml` leaves behind: weights of every kind.
    yield "base-like, weights of every kind", lambda: (ROOT / "target/tmp/coreml/c.safetensors", HERE / "base-like")

    def pipeline(name):
        model = folder / name
        if not model.exists():
            shutil.copytree(HERE / "base-like", model, ignore=shutil.ignore_patterns("unet"))
            shutil.copytree(HERE / "architectures" / name / "unet", model / "unet")
        return model

    def compressed(model):
        out = folder / f"{model.name}-compressed"
        run(squeeze, "compress", "--config", ROOT / CONFIG, "--model", model, "--out", out)
        return out / "unet.squeezed.safetensors", model

    models = {model.name: lambda model=model: model for model in MODELS} | {name: lambda name=name: pipeline(name) for name in ARCHITECTURES}
    for name, model in models.items():
        yield f"{name}, dense fp16", lambda model=model: (model(), None)
        yield f"{name}, 4 bits and 40 % pruned", lambda model=model: compressed(model())


def table(found):
    """The results with a line for each package."""
    of = lambda rows: ",\n".join(f"  {json.dumps(kind)}: {json.dumps(row)}" for kind, row in rows.items())
    return "{\n" + ",\n".join(f" {json.dumps(name)}: {{\n{of(rows)}\n }}" for name, rows in sorted(found.items())) + "\n}\n"


def check_all(squeeze, out, chosen):
    """Checks all models, or those whose names begin with one of `chosen`; the results of others stay in the file. Returns the exit code."""
    out = pathlib.Path(out)
    found = json.loads(out.read_text()) if chosen and out.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        for name, source in sources(pathlib.Path(folder), squeeze):
            if not chosen or name.startswith(tuple(chosen)):
                found[name] = check(squeeze, *source(), folder)
                out.write_text(table(found))
    missed = [f"{name}, {kind}: {row['missed']}" for name, rows in found.items() for kind, row in rows.items() if "missed" in row]
    print(f"{len(missed)} of {sum(map(len, found.values()))} missed", *missed, sep="\n")
    return 1 if missed else 0


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("what", nargs="?", choices=["chunks", "functions"])
    parser.add_argument("paths", nargs="*", type=pathlib.Path)
    parser.add_argument("--weights")
    parser.add_argument("--model", help="the model whose sampler a container's package was written with")
    parser.add_argument("--all", nargs=2, metavar=("SDXL-SQUEEZE", "OUT"))
    parser.add_argument("--models", nargs="*", metavar="NAME", help="for --all: the beginnings of the models' names [default: all]")
    args = parser.parse_args()
    if args.all:
        return check_all(pathlib.Path(args.all[0]).resolve(), args.all[1], args.models)
    stored = Stored(args.weights, args.model)
    print(json.dumps({"chunks": chunks, "functions": functions}[args.what](*args.paths, stored), indent=1))


if __name__ == "__main__":
    sys.exit(main())
