"""Writes golden files with coremltools 9.0, for the tests of Core ML packages.

    python make_coreml.py operations base-like/unet coreml/operations.json   # every operation's parameters, in converted networks
    python make_coreml.py blobs coreml/blobs.bin                             # a weight.bin by Apple's own writer
    python make_coreml.py package coreml/by-coremltools.mlpackage            # a small package by coremltools
    python make_coreml.py vectors coreml/vectors-by-coremltools.mlpackage    # a small package with vector palettes
    python make_coreml.py functions coreml/functions-by-coremltools.mlpackage # two functions in one package
    python make_coreml.py decoded coreml/vectors.safetensors                 # vector palettes, decoded by coremltools
"""

import json
import pathlib
import sys
import tempfile

import coremltools as ct
import numpy as np
import torch
from check_coreml import patterns


def convert(module, inputs, folder, precision=ct.precision.FLOAT16):
    traced = torch.jit.trace(module.eval(), tuple(inputs.values()), check_trace=False)
    kinds = [ct.TensorType(name=name, shape=x.shape, dtype=np.float32 if x.ndim == 1 or name == "time_ids" else np.float16) for name, x in inputs.items()]
    model = ct.convert(
        traced, inputs=kinds, outputs=[ct.TensorType(name="noise_pred", dtype=np.float32)], compute_precision=precision,
        minimum_deployment_target=ct.target.iOS18, skip_model_load=True,
    )  # fmt: skip
    path = pathlib.Path(folder) / f"{type(module).__name__}.mlpackage"
    model.save(str(path))
    return path


class Unet(torch.nn.Module):
    """diffusers' own UNet."""

    def __init__(self, path):
        from diffusers import UNet2DConditionModel

        super().__init__()
        self.unet = UNet2DConditionModel.from_pretrained(path, torch_dtype=torch.float32)

    def forward(self, sample, timestep, encoder_hidden_states, text_embeds, time_ids):
        added = {"text_embeds": text_embeds, "time_ids": time_ids}
        return self.unet(sample, timestep, encoder_hidden_states, added_cond_kwargs=added, return_dict=False)[0]


def unet(path):
    module = Unet(path)
    config = module.unet.config
    # The converter would leave out norms whose weights are 1 and whose biases are 0.
    for name, parameter in module.named_parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    inputs = {
        "sample": torch.randn(2, 4, 16, 16),
        "timestep": torch.full((2,), 5.0),
        "encoder_hidden_states": torch.randn(2, 77, config.cross_attention_dim),
        "text_embeds": torch.randn(2, pooled),
        "time_ids": torch.ones(2, 6),
    }
    return module, inputs


def single(op):
    """Whether an operation of the UNet is computed in fp16. Those from timestep and time ids to their sinusoids are not."""
    seen, waiting = set(), [op]
    while waiting:
        here = waiting.pop()
        if here.op_type in ("sin", "cos"):
            return False
        for var in here.outputs:
            if here.op_type in ("mul", "expand_dims", "reshape", "const", "cast"):
                waiting += [child for child in var.child_ops if child not in seen and child.op_type in ("mul", "expand_dims", "reshape", "sin", "cos", "cast")]
        seen.add(here)
    given = [x for x in op.inputs.values() if not isinstance(x, (tuple, list))] + [y for x in op.inputs.values() if isinstance(x, (tuple, list)) for y in x]
    return not any(x.op is not None and x.op.op_type in ("sin", "cos") for x in given)


class Sinusoids(torch.nn.Module):
    """The embedding of timesteps and time ids, which this project computes in fp32."""

    def forward(self, sample, timestep, time_ids):
        def sinusoids(x):
            angles = x[:, None] * torch.exp(-torch.arange(16) / 16.0)[None]
            return torch.cat([torch.cos(angles), torch.sin(angles)], -1)

        return torch.cat([sample, sinusoids(timestep), sinusoids(time_ids.flatten()).reshape(2, -1)], -1)


class Split(torch.nn.Module):
    """The parts of a transformer block on [b, c, 1, s], head by head, like SPLIT_EINSUM of apple/ml-stable-diffusion."""

    def __init__(self, channels=64, heads=2):
        super().__init__()
        conv = lambda a, b: torch.nn.Conv2d(a, b, 1)
        self.heads, self.width = heads, channels // heads
        self.norm = torch.nn.LayerNorm(channels)
        self.norm.weight.data = torch.randn(channels)
        self.norm.bias.data = torch.randn(channels)
        self.q, self.k, self.v, self.up = conv(channels, channels), conv(channels, channels), conv(channels, channels), conv(channels, 8 * channels)

    def forward(self, sample, encoder_hidden_states):
        b, c, h, w = sample.shape
        x = sample.view(b, c, 1, h * w)
        x = torch.nn.functional.layer_norm(x.transpose(1, 3), (c,), self.norm.weight, self.norm.bias).transpose(1, 3)
        text = encoder_hidden_states.transpose(1, 2).unsqueeze(2)
        q, k, v = self.q(x), self.k(text).transpose(1, 3), self.v(text)
        out = []
        for i in range(self.heads):
            at = slice(i * self.width, (i + 1) * self.width)
            weights = (torch.einsum("bchq,bkhc->bkhq", q[:, at], k[:, :, :, at]) * self.width**-0.5).softmax(dim=1)
            out.append(torch.einsum("bkhq,bchk->bchq", weights, v[:, at]))
        hidden, gate = self.up(torch.cat(out, 1) + x).chunk(2, 1)
        return (hidden * torch.nn.functional.gelu(gate)).view(b, -1, h, w)


class Compressed(torch.nn.Module):
    """A network with weights of every kind: palettized, pruned and palettized, and pruned."""

    def __init__(self, channels=16):
        super().__init__()
        self.layers = torch.nn.ModuleList()
        for kinds in ([2], [1, 2], [1]):
            for layer in (torch.nn.Linear(channels, channels), torch.nn.Conv2d(channels, channels, 3, padding=1)):
                random = torch.randint(0, 16, layer.weight.shape)
                lut = torch.linspace(-1.0, 1.0, 16).half().float()
                layer.weight.data = lut[random]
                if 1 in kinds:
                    layer.weight.data *= torch.rand_like(layer.weight) > 0.4
                layer.register_buffer("_COREML_/weight/compression_type", torch.tensor(kinds))
                if 2 in kinds:
                    layer.register_buffer("_COREML_/weight/lut", lut.reshape([1] * layer.weight.ndim + [16, 1]))
                self.layers.append(layer)

    def forward(self, sample):
        for layer in self.layers:
            sample = layer(sample) if isinstance(layer, torch.nn.Conv2d) else layer(sample.transpose(1, 3)).transpose(1, 3)
        return sample


def lookup(random, shape, bits, length, groups, sparsity):
    """Random indices, look-up table and mask of a weight of `shape` with vectors of `length` output channels."""
    places = [shape[0] // length, *shape[1:]]
    lut = random.normal(size=[groups, *[1] * (len(shape) - 1), 2**bits, length]).astype(np.float16)
    mask = None if sparsity is None else (random.random(places) >= sparsity).astype(np.uint8)
    count = places if mask is None else [int(mask.sum())]
    return random.integers(0, 2**bits, count).astype(np.uint8), lut, mask


def vectors(out):
    """A network of linear layers and convolutions whose weights are looked up as vectors, with and without masks.

    coremltools' own converter cannot make a masked weight with vectors: it takes the mask of elements for one of vectors.
    """
    import shutil

    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.mil import types

    random = np.random.default_rng(5)
    narrow = lambda values, bits: values.astype(types.nptype_from_builtin(types.string_to_builtin(f"uint{bits}")))

    def weight(name, shape, bits, length, groups, sparsity):
        indices, lut, mask = lookup(random, shape, bits, length, groups, sparsity)
        axis = {"vector_axis": np.int32(0)} if length > 1 else {}
        if mask is None:
            return mb.constexpr_lut_to_dense(indices=narrow(indices, bits), lut=lut, name=name, **axis)
        mask, values = mb.constexpr_lut_to_sparse(
            indices_mask=narrow(mask, 1), indices_nonzero_data=narrow(indices, bits), lut=lut, name=f"{name}_palettized", **axis
        )
        return mb.constexpr_sparse_to_dense(nonzero_data=values, mask=mask, name=name)

    @mb.program(input_specs=[mb.TensorSpec(shape=(2, 16, 8, 8), dtype=types.fp16)], opset_version=ct.target.iOS18)
    def program(sample):
        zeros = np.zeros(16, np.float16)
        conv = dict(bias=zeros, strides=[1, 1], pad_type="custom", dilations=[1, 1], groups=1)
        for i, (bits, length, groups, sparsity) in enumerate([(4, 2, 4, None), (8, 4, 1, None), (4, 2, 1, 0.4), (6, 4, 2, 0.3)]):
            sample = mb.conv(x=sample, weight=weight(f"conv_{i}", [16, 16, 3, 3], bits, length, groups, sparsity), pad=[1, 1, 1, 1], **conv)
            tokens = mb.transpose(x=sample, perm=[0, 2, 3, 1])
            tokens = mb.linear(x=tokens, weight=weight(f"linear_{i}", [16, 16], bits, length, groups, sparsity), bias=zeros)
            sample = mb.transpose(x=tokens, perm=[0, 3, 1, 2])
        return mb.cast(x=sample, dtype="fp32", name="noise_pred")

    model = ct.convert(program, minimum_deployment_target=ct.target.iOS18, compute_precision=ct.precision.FLOAT32, skip_model_load=True)
    shutil.rmtree(out, ignore_errors=True)
    model.save(str(out))


def functions(out):
    """One network for two sizes, put into one package by coremltools' own `save_multifunction`."""
    import shutil

    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.mil import types

    random = np.random.default_rng(7)
    weight, bias = random.normal(size=[16, 4, 3, 3]).astype(np.float16), random.normal(size=16).astype(np.float16)
    parameters = dict(weight=weight, bias=bias, strides=[1, 1], pad_type="custom", pad=[1, 1, 1, 1], dilations=[1, 1], groups=1)
    described = ct.utils.MultiFunctionDescriptor()
    with tempfile.TemporaryDirectory() as folder:
        for name, size in (("small", 8), ("large", 16)):

            @mb.program(input_specs=[mb.TensorSpec(shape=(1, 4, size, size), dtype=types.fp16)], opset_version=ct.target.iOS18)
            def program(sample):
                return mb.silu(x=mb.conv(x=sample, **parameters), name="made")

            model = ct.convert(program, minimum_deployment_target=ct.target.iOS18, compute_precision=ct.precision.FLOAT32, skip_model_load=True)
            path = f"{folder}/{name}.mlpackage"
            model.save(path)
            described.add_function(path, src_function_name="main", target_function_name=name)
        described.default_function_name = "large"
        shutil.rmtree(out, ignore_errors=True)
        ct.utils.save_multifunction(described, out)


def decoded(out):
    """Vector palettes of many kinds as the value inference of MIL's operations decodes them."""
    from coremltools.converters.mil.mil.ops.defs.iOS18.compression import constexpr_lut_to_dense, constexpr_lut_to_sparse, constexpr_sparse_to_dense
    from safetensors.numpy import save_file

    random = np.random.default_rng(6)
    found = {}
    for bits in (1, 2, 3, 4, 6, 8):
        for length in (2, 3, 4, 8):
            for groups, sparsity in ((1, None), (2, None), (3, 0.4), (1, 0.7)):
                shape = [[length * groups * 2, 5], [length * groups, 3, 2, 3]][bits % 2]
                indices, lut, mask = lookup(random, shape, bits, length, groups, sparsity)
                if mask is None:
                    dense = constexpr_lut_to_dense.decompress(indices, lut, 0)
                else:
                    whole, values = constexpr_lut_to_sparse.decompress(mask, indices, lut, 0)
                    dense = constexpr_sparse_to_dense.decompress(values, whole)
                assert list(dense.shape) == shape and dense.dtype == np.float16
                name = f"{bits}-{length}-{groups}-{'dense' if mask is None else 'masked'}"
                found |= {f"{name}.indices": indices, f"{name}.lut": lut, f"{name}.dense": np.ascontiguousarray(dense)}
                found |= {} if mask is None else {f"{name}.mask": mask}
    save_file(found, out)


def operations(path, out):
    torch.manual_seed(0)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        module, inputs = unet(path)
        exact = ct.transform.FP16ComputePrecision(op_selector=single)
        rows = {"sample": torch.randn(2, 8), "timestep": torch.ones(2), "time_ids": torch.ones(2, 6)}
        packages = [
            convert(module, inputs, folder, exact),
            convert(Sinusoids(), rows, folder, exact),
            convert(Split(), {"sample": torch.randn(2, 64, 4, 4), "encoder_hidden_states": torch.randn(2, 7, 64)}, folder),
            convert(Compressed(), {"sample": torch.randn(2, 16, 8, 8)}, folder),
        ]
        vectors(pathlib.Path(folder) / "vectors.mlpackage")
        for package in packages + [pathlib.Path(folder) / "vectors.mlpackage"]:
            for kind, parameters in patterns(package).items():
                found.setdefault(kind, set()).update(parameters)
    rows = {kind: sorted(" ".join(map(str, row)).strip() for row in parameters) for kind, parameters in found.items()}
    pathlib.Path(out).write_text(json.dumps(rows, indent=1, sort_keys=True) + "\n")


def blobs(out):
    from coremltools.libmilstoragepython import _BlobStorageWriter as Writer

    pathlib.Path(out).unlink(missing_ok=True)
    writer = Writer(out)
    for bits, name in [(1, "uint1"), (2, "uint2"), (3, "uint3"), (4, "uint4"), (6, "uint6")]:
        for length in (16, 21):
            values = [(i * i * i + i // 2 + bits) % 2**bits for i in range(length)]
            getattr(writer, f"write_{name}_data")(np.array(values, np.uint8))
    writer.write_uint8_data(np.array([(i * i * i + i // 2 + 8) % 256 for i in range(21)], np.uint8))
    writer.write_fp16_data(np.array([i / 4 - 2 for i in range(21)], np.float16).view(np.uint16))
    writer.write_float_data(np.array([i / 4 - 2 for i in range(21)], np.float32))


def package(out):
    import shutil

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        made = convert(Compressed(), {"sample": torch.randn(2, 16, 8, 8)}, folder)
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(made, out)


if __name__ == "__main__":
    {"operations": operations, "blobs": blobs, "package": package, "vectors": vectors, "functions": functions, "decoded": decoded}[sys.argv[1]](*sys.argv[2:])
