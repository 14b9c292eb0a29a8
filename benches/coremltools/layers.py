"""SparseGPT and palettes on single layers: coremltools against this project, in one run on one machine.

    python benches/coremltools/layers.py --ours target/release/examples/solve_layers [--rounds 2]

Needs torch, safetensors and coremltools 9.0; `cargo build --release --example solve_layers` makes ours. Both get the same weights and
inputs, on the same number of threads, in turns. What is timed is what a layer costs: the Hessian of its inputs and SparseGPT at 40 %
(`ModuleSparseGPTConfig(weight_dtype="float32")`, without its reading of the data), or `PostTrainingPalettizer` with its defaults.
"""

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import torch
from coremltools.optimize.torch.layerwise_compression.algorithms import ModuleSparseGPTConfig, SparseGPT
from coremltools.optimize.torch.palettization import (
    ModulePostTrainingPalettizerConfig,
    PostTrainingPalettizer,
    PostTrainingPalettizerConfig,
)
from safetensors.torch import save_file

SPARSEGPT = {"1280x1280": (1280, 1280), "5120x1280": (5120, 1280), "1280x5120": (1280, 5120), "conv 640 3x3 at 32x32": (640, 640)}
PALETTES = {"1280x1280 gs16": ("1280x1280", 16), "1280x1280 gs4": ("1280x1280", 4), "5120x1280 gs16": ("5120x1280", 16)}


def make_layers():
    torch.manual_seed(0)
    layers = {}
    for name, (o, d) in SPARSEGPT.items():
        if name.startswith("conv"):
            weight = torch.randn(o, d, 3, 3) * 0.02
            inputs = torch.randn(16, d, 32, 32)
        else:
            weight = torch.randn(o, d) * 0.02
            inputs = torch.randn(2048, d) @ (torch.eye(d) + 0.3 * torch.randn(d, d) / d**0.5)
        layers[name] = (weight.half().float(), inputs.contiguous())
    return layers


def module(weight):
    if weight.dim() == 4:
        layer = torch.nn.Conv2d(weight.shape[1], weight.shape[0], 3, padding=1, bias=False)
    else:
        layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = weight.clone()
    return layer.eval()


@torch.no_grad()
def sparsegpt(weight, inputs):
    layer = module(weight)
    batches = list(inputs.split(1)) if weight.dim() == 4 else [inputs]
    outputs = [layer(batch) for batch in batches]
    start = time.perf_counter()
    algorithm = SparseGPT(layer, ModuleSparseGPTConfig(target_sparsity=0.4, weight_dtype="float32"))
    for batch, output in zip(batches, outputs):
        algorithm.add_batch(batch, output)
    algorithm.compress()
    return time.perf_counter() - start


@torch.no_grad()
def palettize(weight, group_size):
    model = torch.nn.Sequential(module(weight))
    settings = ModulePostTrainingPalettizerConfig(n_bits=4, granularity="per_grouped_channel", group_size=group_size)
    start = time.perf_counter()
    PostTrainingPalettizer(model, PostTrainingPalettizerConfig(global_config=settings)).compress(inplace=True)
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ours", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    layers = make_layers()
    times = {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "layers.safetensors"
        tensors = {f"{name}.weight": weight for name, (weight, _) in layers.items()}
        tensors |= {f"{name}.inputs": inputs for name, (_, inputs) in layers.items()}
        save_file(tensors, file)
        for _ in range(args.rounds):
            for name, (weight, inputs) in layers.items():
                times.setdefault(("SparseGPT 40 %", name), ([], []))[0].append(sparsegpt(weight, inputs))
            for name, (layer, group_size) in PALETTES.items():
                times.setdefault(("4-bit palettes", name), ([], []))[0].append(palettize(layers[layer][0], group_size))
            # As the command line sets them for itself: src/cli/environment.rs.
            environment = os.environ | {"GOMP_SPINCOUNT": "5000", "MKL_CBWR": "AUTO,STRICT"}
            ours = subprocess.run([args.ours, file], check=True, capture_output=True, text=True, env=environment).stdout
            for line in map(json.loads, ours.splitlines()):
                times[(line["what"], line["layer"])][1].append(line["seconds"])
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}; median of {args.rounds} rounds in turn\n")
    print("| | layer | coremltools 9.0 | ours | ratio |\n|---|---|---|---|---|")
    for (what, name), (theirs, ours) in times.items():
        theirs, ours = statistics.median(theirs), statistics.median(ours)
        print(f"| {what} | {name} | {theirs:.3f} s | {ours:.3f} s | {theirs / ours:.1f} |")


if __name__ == "__main__":
    main()
