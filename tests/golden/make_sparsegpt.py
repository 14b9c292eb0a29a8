"""Prunes small random layers with coremltools' SparseGPT, and saves the inputs and the results.

    python make_sparsegpt.py sparsegpt.safetensors

The script needs torch 2.11.0, coremltools 9.0 and safetensors. coremltools accumulates the Hessians.
Weights and inputs are fp16 numbers; results are fp32.
"""

import copy
import sys

import torch
from coremltools.optimize.torch.layerwise_compression.algorithms import ModuleSparseGPTConfig, SparseGPT
from safetensors.torch import save_file

RECIPES = {
    "40": {"target_sparsity": 0.4},
    "50": {"target_sparsity": 0.5},
    "2of4": {"n_m_ratio": (2, 4)},
}


def correlated(generator, shape, axis):
    """Random inputs whose channels (along `axis`) are mixed, some much stronger than others."""
    channels = shape[axis]
    mix = torch.randn(channels, channels, generator=generator) / channels**0.5
    mix = mix * torch.exp(0.7 * torch.randn(channels, 1, generator=generator)) + 0.3 * torch.eye(channels)
    return (torch.randn(shape, generator=generator).movedim(axis, -1) @ mix).movedim(-1, axis).half().float()


def cases(generator):
    linear = torch.nn.Linear(200, 32, bias=False)
    inputs = correlated(generator, (2, 104, 200), -1)
    inputs[..., 17] = 0
    yield "linear-dead", linear, [inputs[0], inputs[1]], list(RECIPES)

    linear = torch.nn.Linear(128, 64, bias=False)
    inputs = correlated(generator, (4, 40, 128), -1)
    yield "linear", linear, [inputs[:3], inputs[3:]], list(RECIPES)

    conv = torch.nn.Conv2d(8, 24, 3, stride=2, padding=1, bias=False)
    inputs = correlated(generator, (6, 8, 12, 12), 1)
    yield "conv-stride-2", conv, [inputs[:2], inputs[2:]], list(RECIPES)

    conv = torch.nn.Conv2d(16, 24, 3, padding=1, bias=False)
    inputs = correlated(generator, (4, 16, 8, 8), 1)
    yield "conv-3x3", conv, [inputs], list(RECIPES)

    conv = torch.nn.Conv2d(48, 32, 1, bias=False)
    inputs = correlated(generator, (3, 48, 6, 6), 1)
    yield "conv-1x1", conv, [inputs], list(RECIPES)


@torch.no_grad()
def main(out):
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(231)
    tensors = {}
    for name, layer, batches, recipes in cases(generator):
        shape = layer.weight.shape
        layer.weight.copy_((torch.randn(shape, generator=generator) / shape[1:].numel() ** 0.5).half().float())
        tensors[f"{name}.weight"] = layer.weight.half()
        for index, batch in enumerate(batches):
            tensors[f"{name}.input.{index}"] = batch.half()
        for recipe in recipes:
            pruned = copy.deepcopy(layer)
            algorithm = SparseGPT(pruned, ModuleSparseGPTConfig(weight_dtype="float32", **RECIPES[recipe]))
            for batch in batches:
                algorithm.add_batch(batch, pruned(batch))
            if name not in ("linear-dead", "linear", "conv-3x3"):  # to keep the file small
                tensors[f"{name}.hessian"] = algorithm._hessian.clone()
            algorithm._compress_impl()
            tensors[f"{name}.{recipe}"] = pruned.weight.clone()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out)
    for name, tensor in tensors.items():
        print(name, list(tensor.shape), f"{(tensor == 0).float().mean():.4f} zero")


if __name__ == "__main__":
    main(sys.argv[1])
