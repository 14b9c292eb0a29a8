"""Evaluates the program of a Core ML package in torch.

This module shares nothing with the Rust code: the protobuf classes are those of coremltools,
weight.bin is read with struct and numpy, and the operations follow the documentation of coremltools.
The declared type of each output is compared with the type of the result.
"""

import json
import pathlib
import struct

import numpy as np
import torch
import torch.nn.functional as F
from coremltools.proto import MIL_pb2, Model_pb2

BLOB = {1: ("f2", 16), 2: ("f4", 32), 3: ("u", 8), 9: ("u", 1), 10: ("u", 2), 11: ("u", 4), 12: ("u", 3), 13: ("u", 6), 14: ("i4", 32)}
TYPES = {
    "FLOAT16": ("f2", 16), "FLOAT32": ("f4", 32), "INT32": ("i4", 32), "BOOL": ("?", 8), "STRING": ("str", 0),
    "UINT1": ("u", 1), "UINT2": ("u", 2), "UINT3": ("u", 3), "UINT4": ("u", 4), "UINT6": ("u", 6), "UINT8": ("u", 8),
}  # fmt: skip


def unpack(data, bits, count):
    stream = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")
    assert len(data) == -(-count * bits // 8) and not stream[count * bits :].any()
    out = np.zeros(count, np.uint8)
    for bit in range(bits):
        out |= stream[bit : count * bits : bits] << bit
    return out


class Package:
    """A package, and one of its functions: by default `main`, or the default function of several."""

    def __init__(self, path, function=None):
        path = pathlib.Path(path)
        items = json.loads((path / "Manifest.json").read_text())
        paths = {item["name"]: path / "Data" / item["path"] for item in items["itemInfoEntries"].values()}
        root = items["itemInfoEntries"][items["rootModelIdentifier"]]
        self.model = Model_pb2.Model()
        self.model.ParseFromString((path / "Data" / root["path"]).read_bytes())
        self.weights = np.memmap(paths["weights"] / "weight.bin", np.uint8, "r")
        name = function or self.model.description.defaultFunctionName or "main"
        function = self.model.mlProgram.functions[name]
        self.inputs = {value.name: self.type(value.type) for value in function.inputs}
        self.block = function.block_specializations[function.opset]

    @staticmethod
    def type(value):
        tensor = value.tensorType
        shape = tuple(dimension.constant.size for dimension in tensor.dimensions)
        assert len(shape) == tensor.rank
        return MIL_pb2.DataType.Name(tensor.dataType), shape

    def array(self, kind, shape, data, code=None):
        dtype, bits = TYPES[kind]
        assert code is None or BLOB[code] == (dtype, bits), (code, kind)
        count = int(np.prod(shape, dtype=np.int64))
        values = unpack(data, bits, count) if dtype == "u" else np.frombuffer(data, "<" + dtype)
        assert values.size == count
        return values.reshape(shape)

    def value(self, value):
        kind, shape = self.type(value.type)
        if value.WhichOneof("value") == "blobFileValue":
            assert value.blobFileValue.fileName == "@model_path/weights/weight.bin"
            offset = value.blobFileValue.offset
            record = bytes(self.weights[offset : offset + 64])
            sentinel, code, size, start, padding = struct.unpack_from("<IIQQQ", record)
            assert sentinel == 0xDEADBEEF and start == offset + 64 and padding == -int(np.prod(shape, dtype=np.int64)) * TYPES[kind][1] % 8
            return self.array(kind, shape, bytes(self.weights[start : start + size]), code)
        tensor = value.immediateValue.tensor
        values = getattr(tensor, tensor.WhichOneof("value")).values
        if isinstance(values, bytes):
            return self.array(kind, shape, values)
        if kind == "STRING":
            return values[0]
        return np.array(values, TYPES[kind][0]).reshape(shape)


def palette(indices, lut, mask):
    """The palette entry of each kept place, [kept, values of an entry]. `indices` are in the order of `mask`."""
    groups = lut.shape[: mask.ndim]
    place = np.zeros(mask.shape, np.int64)
    for axis, (size, parts) in enumerate(zip(mask.shape, groups)):
        at = (np.arange(size) // (size // parts)).reshape([-1 if i == axis else 1 for i in range(mask.ndim)])
        place = place * parts + at
    return lut.reshape(-1, *lut.shape[-2:])[place[mask], indices]


def spread(entries, mask, axis):
    """The array whose `axis` has the values of each place's entry side by side; zero where `mask` is."""
    length = entries.shape[-1]
    apart = np.zeros((*mask.shape, length), entries.dtype)
    apart[mask] = entries
    shape = [size * length if i == axis % mask.ndim else size for i, size in enumerate(mask.shape)]
    return np.moveaxis(apart, -1, axis % mask.ndim + 1).reshape(shape)


def constexpr(kind, a):
    axis = int(a.get("vector_axis", 0))
    assert "lut" not in a or a["lut"].shape[-1] == 1 or "vector_axis" in a
    if kind == "constexpr_lut_to_dense":
        mask = np.ones(a["indices"].shape, bool)
        return spread(palette(a["indices"].reshape(-1), a["lut"], mask), mask, axis)
    if kind == "constexpr_lut_to_sparse":
        mask = a["indices_mask"].astype(bool)
        entries = palette(a["indices_nonzero_data"], a["lut"], mask)
        whole = np.repeat(a["indices_mask"], entries.shape[-1], axis)
        return whole, spread(entries, mask, axis)[whole.astype(bool)]
    if kind == "constexpr_cast":
        assert a["source_val"].dtype == np.float16 and a["output_dtype"] == "fp32"
        return a["source_val"].astype(np.float32)
    if kind == "constexpr_sparse_to_dense":
        dense = np.zeros(a["mask"].shape, a["nonzero_data"].dtype)
        assert a["mask"].sum() == a["nonzero_data"].size
        dense[a["mask"].astype(bool)] = a["nonzero_data"]
        return dense
    raise NotImplementedError(kind)


def conv(a):
    top, bottom, left, right = a["pad"].tolist()
    assert a["pad_type"] == "custom" or not any((top, bottom, left, right))
    x = F.pad(a["x"], (left, right, top, bottom))
    return F.conv2d(x, a["weight"], a["bias"], a["strides"].tolist(), 0, a["dilations"].tolist(), int(a["groups"]))


def layer_norm(a):
    (axis,) = a["axes"].tolist()
    x = a["x"].movedim(axis, -1)
    x = F.layer_norm(x, x.shape[-1:], a["gamma"], a["beta"], float(a["epsilon"]))
    return x.movedim(-1, axis)


def batch_norm(a):
    return F.batch_norm(a["x"], a["mean"], a["variance"], a["gamma"], a["beta"], False, 0.0, float(a["epsilon"]))


def slice_by_index(a):
    ends = [None if mask else end for end, mask in zip(a["end"].tolist(), a["end_mask"].tolist())]
    return a["x"][tuple(slice(begin, end) for begin, end in zip(a["begin"].tolist(), ends))]


def expand_dims(a):
    x = a["x"]
    for axis in sorted(a["axes"].tolist()):
        x = x.unsqueeze(axis)
    return x


def upsample(a):
    down, right = float(a["scale_factor_height"]), float(a["scale_factor_width"])
    assert down == right == 2
    return a["x"].repeat_interleave(2, 2).repeat_interleave(2, 3)


def gather(a):
    axis, indices = int(a["axis"]), a["indices"]
    assert int(a["batch_dims"]) == 0 and not a["validate_indices"] and not torch.is_floating_point(indices)
    x = a["x"].index_select(axis, indices.reshape(-1))
    return x.reshape(*a["x"].shape[:axis], *indices.shape, *a["x"].shape[axis + 1 :])


def reduce_argmax(a):
    axis = int(a["axis"])
    highest = a["x"].amax(axis, keepdim=True)
    # Core ML does not promise which of equal values it takes.
    assert ((a["x"] == highest).sum(axis) == 1).all(), "two positions have the highest value"
    return a["x"].argmax(axis, keepdim=bool(a["keep_dims"]))


def cast(a):
    return a["x"].long() if a["dtype"] in ("int32", "int16", "uint16") else a["x"].float()


OPS = {
    "cast": cast,
    "equal": lambda a: a["x"] == torch.as_tensor(a["y"]),
    "gather": gather,
    "reduce_argmax": reduce_argmax,
    "reduce_max": lambda a: a["x"].amax(a["axes"].tolist(), keepdim=bool(a["keep_dims"])),
    "sigmoid": lambda a: torch.sigmoid(a["x"]),
    "add": lambda a: a["x"] + a["y"],
    "sub": lambda a: a["x"] - a["y"],
    "mul": lambda a: a["x"] * a["y"],
    "real_div": lambda a: a["x"] / a["y"],
    "silu": lambda a: a["x"] * torch.sigmoid(a["x"]),
    "sin": lambda a: torch.sin(a["x"]),
    "cos": lambda a: torch.cos(a["x"]),
    "square": lambda a: a["x"] ** 2,
    "sqrt": lambda a: torch.sqrt(a["x"]),
    "gelu": lambda a: 0.5 * a["x"] * (1 + torch.erf(a["x"] / 2**0.5)),
    "softmax": lambda a: torch.softmax(a["x"], int(a["axis"])),
    "linear": lambda a: a["x"] @ a["weight"].T + a["bias"],
    "conv": conv,
    "layer_norm": layer_norm,
    "batch_norm": batch_norm,
    "reduce_mean": lambda a: a["x"].mean(a["axes"].tolist(), keepdim=bool(a["keep_dims"])),
    "scaled_dot_product_attention": lambda a: torch.softmax(a["query"] @ a["key"].mT / a["query"].shape[-1] ** 0.5 + a.get("attn_mask", 0), -1) @ a["value"],
    "einsum": lambda a: torch.einsum(a["equation"], *a["values"]),
    "reshape": lambda a: a["x"].reshape(a["shape"].tolist()),
    "transpose": lambda a: a["x"].permute(a["perm"].tolist()),
    "expand_dims": expand_dims,
    "concat": lambda a: torch.cat(a["values"], int(a["axis"])),
    "split": lambda a: a["x"].split(a["split_sizes"].tolist(), int(a["axis"])),
    "slice_by_index": slice_by_index,
    "upsample_nearest_neighbor": upsample,
}


def evaluate(package, inputs, half=False):
    """The outputs for `inputs`, torch tensors by name. All operations are computed in fp32. With `half`,
    each value that is declared as fp16 is rounded to fp16."""

    def held(value, kind):
        if isinstance(value, np.ndarray) and value.dtype.kind == "f":
            value = torch.from_numpy(value.astype(np.float32))
        if half and kind == "FLOAT16" and torch.is_tensor(value):
            value = value.half().float()
        return value

    last = {}
    for at, op in enumerate(package.block.operations):
        for argument in op.inputs.values():
            last.update({b.name: at for b in argument.arguments if b.WhichOneof("binding") == "name"})
    last.update({name: None for name in package.block.outputs})

    values = {}
    for name, (kind, shape) in package.inputs.items():
        assert tuple(inputs[name].shape) == shape, (name, inputs[name].shape, shape)
        values[name] = held(inputs[name].float(), kind)
    raw = {}  # stored constants that constexpr operations read
    for at, op in enumerate(package.block.operations):
        kinds = [package.type(output.type) for output in op.outputs]
        if op.type == "const":
            results = (package.value(op.attributes["val"]),)
        elif op.type.startswith("constexpr_"):
            arguments = {}
            for name, argument in op.inputs.items():
                (binding,) = argument.arguments
                arguments[name] = raw[binding.name] if binding.WhichOneof("binding") == "name" else package.value(binding.value)
            results = constexpr(op.type, arguments)
            results = results if isinstance(results, tuple) else (results,)
            raw.update({output.name: result for output, result in zip(op.outputs, results)})
        else:
            arguments = {}
            for name, argument in op.inputs.items():
                given = [values[binding.name] for binding in argument.arguments]
                arguments[name] = given if name == "values" else given[0]
            results = OPS[op.type](arguments)
            results = tuple(results) if isinstance(results, (tuple, list)) else (results,)
        assert len(results) == len(op.outputs)
        for output, (kind, shape), result in zip(op.outputs, kinds, results):
            assert isinstance(result, str) or tuple(result.shape) == shape, (op.type, output.name, result.shape, shape)
            # Only other constant expressions read a mask and packed values.
            if not (op.type == "constexpr_lut_to_sparse"):
                values[output.name] = held(result, kind)
        if op.type.startswith("constexpr_") and op.type != "constexpr_lut_to_sparse":
            raw.clear()
        for argument in op.inputs.values():
            for binding in argument.arguments:
                if binding.WhichOneof("binding") == "name" and last[binding.name] == at:
                    values.pop(binding.name, None)
    return {name: values[name] for name in package.block.outputs}
