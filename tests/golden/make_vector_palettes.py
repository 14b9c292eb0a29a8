"""Palettizes small random fp16 weights by vectors with coremltools' PostTrainingPalettizer (`cluster_dim`).

    python make_vector_palettes.py --out vector-palettes.safetensors

FILE gets:

    linear, conv                                  the weights
    LAYER/vV.bBITS/tensor, LAYER/vV.bBITS/gsSIZE  the weights after palettizing by vectors of V output channels
"""
import argparse
from pathlib import Path

import torch
from coremltools.optimize.torch.palettization import PostTrainingPalettizer, PostTrainingPalettizerConfig
from safetensors.torch import save_file


def palettize(weight, bits, vector, group_size):
    if weight.dim() == 2:
        layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    else:
        layer = torch.nn.Conv2d(weight.shape[1], weight.shape[0], tuple(weight.shape[2:]), bias=False)
    layer = layer.half()
    layer.weight.data = weight.clone()
    config = {"n_bits": bits, "cluster_dim": vector, "enable_fast_kmeans_mode": False}
    if group_size is None:
        config["granularity"] = "per_tensor"
    else:
        config |= {"granularity": "per_grouped_channel", "group_size": group_size, "channel_axis": 0}
    config = PostTrainingPalettizerConfig.from_dict({"global_config": config})
    return PostTrainingPalettizer(torch.nn.Sequential(layer), config).compress()[0].weight.data


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, required=True)
    options = options.parse_args()
    generator = torch.Generator().manual_seed(3)
    row_sizes = 0.02 * (0.5 + torch.rand(32, 1, generator=generator))
    out = {
        "linear": (torch.randn(32, 96, generator=generator) * row_sizes).half(),
        "conv": (torch.randn(32, 16, 3, 3, generator=generator) * row_sizes[..., None, None]).half(),
    }
    for name in ("linear", "conv"):
        for vector, bits, group_size in [(2, 3, None), (2, 4, 16), (2, 6, None), (4, 4, None), (4, 6, None), (4, 4, 16)]:
            group = "tensor" if group_size is None else f"gs{group_size}"
            out[f"{name}/v{vector}.b{bits}/{group}"] = palettize(out[name], bits, vector, group_size)
    save_file(out, options.out)


if __name__ == "__main__":
    main()
