"""Checks Core ML packages with coremltools 9.0 and torch, without any of the Rust code.

    python check_coreml.py PACKAGE --weights CONTAINER|MODELDIR [--skip loader,values,forward] [--json FILE]
    python check_coreml.py PACKAGE --operations REFERENCE.mlpackage     # compares how operations are serialized

1. loader: Apple's package validator accepts the package, and it opens with skip_model_load. The
   loader of coremltools rebuilds the program and infers the declared type for each output.
2. values: each constant of the program that is a tensor of the UNet is materialized by coremltools,
   and equals the stored tensor bit for bit.
3. forward: mil_torch.py evaluates the program in fp32, and the output is within 1e-4 of that of
   diffusers' UNet with the same weights, or where the program is for Apple's samplers and the
   model's own sampler is known, of the noise that diffusers makes of it. The program is also
   evaluated in fp16.
"""

import argparse
import json
import pathlib
import re
import sys

import numpy as np
import torch
from make_container import unpack
from mil_torch import Package, evaluate
from noise_of_predictions import noise_of, own_timesteps


class Stored:
    """A network's tensors by name, read one at a time from a container (docs/container.md) or a diffusers folder,
    of which it is the UNet.

    `model` is the folder whose sampler a package for Apple's pipeline was written with: by default the source itself."""

    def __init__(self, path, model=None):
        path = pathlib.Path(path)
        self.model = pathlib.Path(model) if model else path if path.is_dir() else None
        self.rows = {}
        if path.is_dir():
            from safetensors import safe_open

            self.config = json.loads((path / "unet/config.json").read_text())
            self.files = [safe_open(file, "pt") for file in sorted((path / "unet").glob("diffusion_pytorch_model*.safetensors"))]
            self.names = [name for file in self.files for name in file.keys()]
            return
        self.data = np.memmap(path, np.uint8, "r")
        length = int.from_bytes(bytes(self.data[:8]), "little")
        self.table = json.loads(bytes(self.data[8 : 8 + length]))
        metadata = self.table.pop("__metadata__")
        self.start = 8 + length
        (config,) = (key for key in metadata if key.endswith("_config"))
        self.config = json.loads(metadata[config])
        self.rows = json.loads(metadata["weights"])
        parts = {f"{name}.{part}" for name in self.rows for part in ("mask", "indices", "palettes", "scales", "values")}
        self.names = sorted(set(self.table) - parts | set(self.rows))
        self.files = None

    def content(self, name):
        entry = self.table[name]
        start, end = (self.start + at for at in entry["data_offsets"])
        return np.frombuffer(bytes(self.data[start:end]), {"F16": "<f2", "U8": "u1"}[entry["dtype"]]).reshape(entry["shape"])

    def tensor(self, name):
        if self.files is not None:
            file = next(file for file in self.files if name in file.keys())
            return file.get_tensor(name).half().numpy()
        if name not in self.rows:
            return self.content(name)
        row = self.rows[name]
        shape = row["shape"]
        numel = int(np.prod(shape))
        length = row.get("vector_length", 1)
        if length > 1:
            return self.vectors(name, row, length)
        keep = unpack(self.content(f"{name}.mask"), 1, numel).astype(bool) if row["masked"] else np.ones(numel, bool)
        dense = np.zeros(numel, np.float16)
        if "bits" not in row:
            dense[keep] = self.content(f"{name}.values")
            return dense.reshape(shape)
        axis = row["axis"]
        channel = np.arange(shape[axis]).reshape([-1 if i == axis else 1 for i in range(len(shape))])
        group = np.broadcast_to(channel // row["group_size"], shape).reshape(-1)[keep]
        indices = unpack(self.content(f"{name}.indices"), row["bits"], row["kept"])
        values = self.content(f"{name}.palettes")[group, indices]
        if row.get("scaled"):
            of_row = np.arange(numel) // (numel // shape[0])
            values = (values.astype(np.float32) * self.content(f"{name}.scales")[of_row[keep]].astype(np.float32)).astype(np.float16)
        dense[keep] = values
        return dense.reshape(shape)

    def vectors(self, name, row, length):
        """A weight whose indices stand for vectors of `length` output channels."""
        shape = row["shape"]
        places = [shape[0] // length, *shape[1:]]
        count = int(np.prod(places))
        keep = unpack(self.content(f"{name}.mask"), 1, count).astype(bool) if row["masked"] else np.ones(count, bool)
        indices = unpack(self.content(f"{name}.indices"), row["bits"], row["kept"] // length)
        group = np.nonzero(keep)[0] // (count // places[0]) * length // row["group_size"]
        dense = np.zeros((count, length), np.float16)
        dense[keep] = self.content(f"{name}.palettes")[group, indices]
        return np.ascontiguousarray(np.moveaxis(dense.reshape(*places, length), -1, 1)).reshape(shape)


def loader(path, function="main"):
    """Rebuilds the program by coremltools, and compares the types of a function."""
    import coremltools as ct
    from coremltools.converters.mil.frontend.milproto.load import load
    from coremltools.libmodelpackage import ModelPackage

    assert ModelPackage.isValid(str(path)), "Apple's validator refuses it"
    model = ct.models.MLModel(str(path), skip_model_load=True)
    spec = model.get_spec()
    program = load(spec, specification_version=spec.specificationVersion, file_weights_dir=model.weights_dir)
    block = spec.mlProgram.functions[function].block_specializations["CoreML8"]
    declared = {output.name: Package.type(output.type) for op in block.operations for output in op.outputs}
    from coremltools.converters.mil.mil import types

    names = {types.fp16: "FLOAT16", types.fp32: "FLOAT32", types.int32: "INT32", types.bool: "BOOL", types.str: "STRING"}
    names |= {getattr(types, f"uint{bits}"): f"UINT{bits}" for bits in (1, 2, 3, 4, 6, 8)}
    seen = 0
    for op in program.functions[function].operations:
        for var in op.outputs:
            inferred = var.sym_type
            shape = tuple(inferred.get_shape()) if types.is_tensor(inferred) else ()
            element = inferred.get_primitive() if types.is_tensor(inferred) else inferred
            # Inline arguments of constexpr operations have no names in the file. coremltools makes constants of them.
            if op.op_type == "const" and var.name not in declared:
                continue
            if op.op_type == "const":
                # pymil widens constants of small types, so only their shapes are compared here.
                assert declared[var.name][1] == shape, (var.name, declared[var.name], shape)
            else:
                assert declared[var.name] == (names[element], shape), (op.op_type, var.name, declared[var.name], names[element], shape)
            seen += 1
    missing = set(declared) - {var.name for op in program.functions[function].operations for var in op.outputs}
    assert not missing, missing
    return program, {"outputs_whose_type_is_as_inferred": len(declared), "operations": len(block.operations)}


def values(program, stored, function="main"):
    """Compares every tensor of the UNet with the one that coremltools materializes."""
    found = materialized(program, stored, function)
    left = sorted(set(stored.names) - set(found))
    assert not left, f"not in the program: {left[:5]}"
    compressed = [op for op in program.functions[function].operations if op.op_type in ("constexpr_lut_to_dense", "constexpr_sparse_to_dense")]
    return {"tensors_equal_bit_for_bit": len(found), "of_them_compressed": len(compressed)}


def materialized(program, stored, function="main"):
    """The names of the UNet's tensors that a function has, each equal to the stored one."""
    left = {re.sub(r"[^A-Za-z0-9]", "_", name): name for name in stored.names}
    assert len(left) == len(stored.names)
    found = []
    for op in program.functions[function].operations:
        name = left.pop(op.outputs[0].name, None)
        if name is None:
            continue
        found.append(name)
        made = op.materialized_val_inference() if op.op_type.startswith("constexpr_") else op.outputs[0].val
        wanted = stored.tensor(name)
        made = np.asarray(made)
        assert made.dtype == np.float16 and made.size == wanted.size, (name, made.dtype, made.shape, wanted.shape)
        made = made.reshape(wanted.shape)
        assert np.array_equal(made.view(np.uint16), wanted.view(np.uint16)), f"{name} differs"
    return found


def random_inputs(package, seed=0):
    """Inputs for a whole UNet, with a timestep and sizes of pictures that occur."""
    torch.manual_seed(seed)
    shapes = {name: shape for name, (_, shape) in package.inputs.items()}
    batch = shapes["sample"][0]
    inputs = {name: torch.randn(shape).half().float() for name, shape in shapes.items()}
    inputs["timestep"] = torch.full((batch,), 741.0)
    sizes = [512.0, 512.0, 0.0, 0.0, 512.0, 512.0] if shapes["time_ids"][1] == 6 else [512.0, 512.0, 0.0, 0.0, 6.0]
    inputs["time_ids"] = torch.tensor([sizes[: shapes["time_ids"][1]]] * batch)
    return inputs


def prediction(stored, inputs, apple):
    """What diffusers' UNet makes of a package's inputs, in fp32."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(stored.config).eval()
    unet.load_state_dict({name: torch.from_numpy(stored.tensor(name)) for name in stored.names}, assign=True)
    # Weights are fp16 in memory and become fp32 while a layer computes. This halves the memory and does not
    # change the results.
    for module in unet.modules():
        if next(module.parameters(recurse=False), None) is not None:
            module.register_forward_pre_hook(lambda module, given: module.float() and None)
            module.register_forward_hook(lambda module, given, made: module.half() and None)
    text = inputs["encoder_hidden_states"]
    text = text[:, :, 0].transpose(1, 2) if apple else text
    added = {"text_embeds": inputs["text_embeds"], "time_ids": inputs["time_ids"]}
    guidance = inputs.get("timestep_cond")
    return unet(inputs["sample"], inputs["timestep"], text, timestep_cond=guidance, added_cond_kwargs=added).sample


def expected(stored, inputs):
    """What a package must make of its inputs: the prediction, and for Apple's samplers noise."""
    apple = len(inputs["encoder_hidden_states"].shape) == 4
    if not apple or not stored.model:
        return prediction(stored, inputs, apple)
    own, sampler = own_timesteps(stored.model)
    (timestep,) = {int(timestep) for timestep in inputs["timestep"]}
    made = prediction(stored, inputs | {"timestep": torch.full_like(inputs["timestep"], own[timestep])}, apple)
    return noise_of(sampler, made, inputs["sample"], timestep)


def forward(package, stored, seed=0):
    inputs = random_inputs(package, seed)
    with torch.no_grad():
        wanted = expected(stored, inputs)
        error = lambda made: float((made - wanted).double().norm() / wanted.double().norm())
        single = error(evaluate(package, inputs)["noise_pred"])
        half = error(evaluate(package, inputs, half=True)["noise_pred"])
    assert single < 1e-4, f"relative error {single}"
    assert half < 3e-2, f"relative error {half} in fp16"
    return {"relative_error_fp32": float(f"{single:.2g}"), "relative_error_fp16": float(f"{half:.2g}")}


def patterns(path):
    """The kinds of operations, and for each parameter its binding, its dtype, its rank, and the text of a string."""
    package = Package(path)
    known = {name: ("var", *shape_of(kind)) for name, kind in package.inputs.items()}
    found = {}
    for op in package.block.operations:
        if op.type == "const":
            value = op.attributes["val"]
            kind = package.type(value.type)
            known[op.outputs[0].name] = ("const", *shape_of(kind), package.value(value) if kind[0] == "STRING" else "")
            assert sorted(op.attributes) == ["name", "val"]
            continue
        assert sorted(op.attributes) == ["name"]
        for output in op.outputs:
            known[output.name] = ("var", *shape_of(package.type(output.type)))
        for parameter, argument in op.inputs.items():
            for binding in argument.arguments:
                if binding.WhichOneof("binding") == "name":
                    what = known[binding.name]
                    # Compressed weights are variables and dense ones are constants. Both count as one kind.
                    what = ("var/const", *what[1:3]) if parameter == "weight" else what
                else:
                    what = ("inline", *shape_of(package.type(binding.value.type)))
                found.setdefault(op.type, set()).add((parameter, *what))
    return found


def shape_of(kind):
    return kind[0], len(kind[1])


def operations(path, reference):
    ours, theirs = patterns(path), patterns(reference)
    strange = {kind: sorted(map(str, found - theirs.get(kind, set()))) for kind, found in ours.items()}
    return {kind: found for kind, found in strange.items() if found}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("package")
    parser.add_argument("--weights")
    parser.add_argument("--operations")
    parser.add_argument("--skip", default="")
    parser.add_argument("--json")
    args = parser.parse_args()
    skip = args.skip.split(",")
    found = {}
    if args.operations:
        found["other_than_in_the_reference"] = operations(args.package, args.operations)
    if args.weights:
        stored = Stored(args.weights)
        if "loader" not in skip:
            program, found["loader"] = loader(args.package)
            if "values" not in skip:
                found["values"] = values(program, stored)
            del program
        if "forward" not in skip:
            found["forward"] = forward(Package(args.package), stored)
    print(json.dumps(found, indent=1))
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    sys.exit(main())
