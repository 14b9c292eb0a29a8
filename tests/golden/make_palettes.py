"""Palettizes small random fp16 weights with coremltools' PostTrainingPalettizer.

    python make_palettes.py --out palettes.safetensors

The palettizer clusters the fp16 weights without rounding them to 4 decimals (`enable_fast_kmeans_mode=False`). FILE gets:

    linear, conv, linear.sparse, conv.sparse      the weights; in the sparse ones the smallest 40 % are zero
    LAYER/bBITS/tensor/lut                        [groups, 2^bits] palettes, padded with zeros at the end
    LAYER/bBITS/gsSIZE.axisAXIS/lut               palettes of groups of channels
    .../weight                                    the weights after palettizing
    .../scale                                     [o] where the name has `.scaled`
"""
import argparse
from pathlib import Path

import torch
from coremltools.optimize.torch.palettization import PostTrainingPalettizer, PostTrainingPalettizerConfig
from safetensors.torch import save_file


def palettize(weight, bits, group, scaled):
    """Returns palettes [groups, 2^bits], weights and scales in fp16."""
    if weight.dim() == 2:
        layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    else:
        layer = torch.nn.Conv2d(weight.shape[1], weight.shape[0], tuple(weight.shape[2:]), bias=False)
    layer = layer.half()
    layer.weight.data = weight.clone()
    model = torch.nn.Sequential(layer)
    config = {"n_bits": bits, "enable_fast_kmeans_mode": False, "enable_per_channel_scale": scaled}
    if group is None:
        config["granularity"] = "per_tensor"
    else:
        config |= {"granularity": "per_grouped_channel", "group_size": group[0], "channel_axis": group[1]}
    config = PostTrainingPalettizerConfig.from_dict({"global_config": config})
    layer = PostTrainingPalettizer(model, config).compress()[0]
    lut = layer.get_buffer("_COREML_/weight/lut").reshape(-1, 2**bits).half()
    scale = layer.get_buffer("_COREML_/weight/palettization_scale").flatten().half() if scaled else None
    return lut, layer.weight.data, scale


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, required=True)
    options = options.parse_args()

    generator = torch.Generator().manual_seed(0)
    # Rows have different norms, so that scales and groups make a difference.
    row_sizes = 0.02 * (0.5 + torch.rand(32, 1, generator=generator))
    linear = (torch.randn(32, 64, generator=generator) * row_sizes).half()
    conv = (torch.randn(32, 32, 3, 2, generator=generator) * row_sizes[..., None, None]).half()
    assert (linear != 0).all() and (conv != 0).all()
    out = {"linear": linear, "conv": conv}
    for name in ("linear", "conv"):
        magnitudes = out[name].abs()
        dropped = magnitudes <= magnitudes.flatten().sort().values[int(0.4 * magnitudes.numel())]
        out[f"{name}.sparse"] = out[name].masked_fill(dropped, 0)

    def add(name, bits, group=None, scaled=False):
        lut, weight, scale = palettize(out[name], bits, group, scaled)
        kind = "tensor" if group is None else f"gs{group[0]}.axis{group[1]}"
        key = f"{name}/b{bits}/{kind}{'.scaled' if scaled else ''}"
        out[f"{key}/lut"], out[f"{key}/weight"] = lut, weight
        if scaled:
            out[f"{key}/scale"] = scale

    for name in ("linear", "conv"):
        for bits in (1, 2, 3, 4, 6, 8):
            add(name, bits)
        for size in (4, 16, 32):
            for axis in (0, 1):
                add(name, 4, (size, axis))
        add(name, 3, (16, 1))
        add(name, 8, (16, 0))
        add(name, 4, None, scaled=True)
        add(name, 4, (16, 0), scaled=True)
        add(name, 4, (16, 1), scaled=True)
        add(f"{name}.sparse", 4)
        add(f"{name}.sparse", 4, (16, 0))
        add(f"{name}.sparse", 4, (16, 1))
    save_file({name: tensor.contiguous() for name, tensor in out.items()}, options.out)


if __name__ == "__main__":
    main()
