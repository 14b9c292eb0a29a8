"""Quantizes small random layers with bitsandbytes, torchao and AutoGPTQ, and saves the inputs and the results.

    pip download --no-deps auto-gptq==0.7.1 && unzip auto_gptq-*.whl -d AutoGPTQ
    python make_quantized.py AutoGPTQ quantized.safetensors

The script needs torch 2.11.0, bitsandbytes 0.50.2, torchao 0.18.0 and safetensors. Of AutoGPTQ it loads the two files
`auto_gptq/quantization/{quantizer,gptq}.py` alone, which need neither its kernels nor transformers. All runs on the CPU.
Weights and inputs are fp16 numbers.
"""

import importlib.util
import pathlib
import sys
import types

import bitsandbytes.functional
import torch
from safetensors.torch import save_file
from torchao.quantization.quant_primitives import MappingType, choose_qparams_affine, quantize_affine

BLOCK = 64


def load_gptq(folder):
    """AutoGPTQ's `GPTQ` and `Quantizer`."""
    transformers = types.ModuleType("transformers")
    transformers.Conv1D = type("Conv1D", (), {})
    transformers.pytorch_utils = types.SimpleNamespace(Conv1D=transformers.Conv1D)
    sys.modules["transformers"] = transformers
    torch.cuda.synchronize = lambda: None
    package = types.ModuleType("quantization")
    package.__path__ = [str(pathlib.Path(folder) / "auto_gptq" / "quantization")]
    sys.modules["quantization"] = package
    for name in ("quantizer", "gptq"):
        spec = importlib.util.find_spec(f"quantization.{name}")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    return sys.modules["quantization.gptq"].GPTQ, sys.modules["quantization.quantizer"].Quantizer


def nearest(tensors, generator):
    """Round to nearest, without a Hessian."""
    weight = (torch.randn(12, 256, generator=generator) * torch.exp(torch.randn(12, 1, generator=generator))).half()
    tensors["nearest.weight"] = weight
    for bits in (4, 8):
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        scales, zeros = choose_qparams_affine(weight.float(), MappingType.SYMMETRIC, (1, BLOCK), torch.int8, low, high, eps=1e-9)
        assert (zeros == 0).all()
        tensors[f"nearest.int{bits}.scales"] = scales.reshape(12, -1).contiguous()
        tensors[f"nearest.int{bits}.codes"] = quantize_affine(weight.float(), (1, BLOCK), scales, zeros, torch.int8, low, high)
    packed, state = bitsandbytes.functional.quantize_4bit(weight.float(), blocksize=BLOCK, quant_type="nf4", compress_statistics=False)
    packed = packed.flatten()
    tensors["nearest.nf4.table"] = state.code.clone()
    tensors["nearest.nf4.scales"] = state.absmax.reshape(12, -1).clone()
    # The first of two codes is in the upper half of a byte.
    codes = torch.stack([packed >> 4, packed & 15], dim=-1).reshape(weight.shape)
    tensors["nearest.nf4.codes"] = codes.contiguous()
    decoded = bitsandbytes.functional.dequantize_4bit(packed.reshape(-1, 1), state)
    assert (decoded - state.code[codes.long()] * state.absmax.reshape(12, -1).repeat_interleave(BLOCK, 1)).abs().max() < 1e-6


def correlated(generator, shape, axis):
    """Random inputs whose channels (along `axis`) are mixed, some much stronger than others."""
    channels = shape[axis]
    mix = torch.randn(channels, channels, generator=generator) / channels**0.5
    mix = mix * torch.exp(0.7 * torch.randn(channels, 1, generator=generator)) + 0.3 * torch.eye(channels)
    return (torch.randn(shape, generator=generator).movedim(axis, -1) @ mix).movedim(-1, axis).half().float()


def layers(generator):
    linear = torch.nn.Linear(160, 24, bias=False)
    inputs = correlated(generator, (1, 320, 160), -1)
    inputs[..., 17] = 0
    yield "linear", linear, inputs
    yield "conv", torch.nn.Conv2d(16, 24, 3, padding=1, bias=False), correlated(generator, (4, 16, 8, 8), 1)


@torch.no_grad()
def with_feedback(tensors, generator, gptq, quantizer):
    class Stored(quantizer):
        """Scales are rounded to fp16 when they are made, since a container stores them so."""

        def find_params(self, *arguments, **options):
            super().find_params(*arguments, **options)
            self.scale = self.scale.half().float()

    for name, layer, inputs in layers(generator):
        shape = layer.weight.shape
        layer.weight.copy_((torch.randn(shape, generator=generator) / shape[1:].numel() ** 0.5).half().float())
        original = layer.weight.clone()
        tensors[f"{name}.weight"], tensors[f"{name}.input"] = original.half(), inputs.half()
        # `published` is all as published. With blocks of the size of a group, every scale sees the errors before it.
        for kind, made_by, block in (("published", quantizer, 128), ("stored", Stored, BLOCK)):
            layer.weight.copy_(original)
            run = gptq(layer)
            run.quantizer = made_by()
            run.quantizer.configure(4, perchannel=True, sym=True)
            run.add_batch(inputs, None)
            scales, zeros, groups = run.fasterquant(blocksize=block, percdamp=0.01, group_size=BLOCK)
            assert (zeros == 8).all()
            codes = layer.weight.flatten(1) / scales[:, groups.long()]
            assert (codes - codes.round()).abs().max() < 1e-3
            tensors[f"{name}.{kind}.codes"] = codes.round().to(torch.int8)
            tensors[f"{name}.{kind}.scales"] = scales


def main(folder, out):
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(232)
    tensors = {}
    nearest(tensors, generator)
    with_feedback(tensors, generator, *load_gptq(folder))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out)
    for name, tensor in tensors.items():
        print(name, tensor.dtype, list(tensor.shape))


if __name__ == "__main__":
    main(*sys.argv[1:])
