"""A container of a small UNet, with every kind of compressed weight, written with numpy alone."""

import make_container
import numpy as np
import torch

from diffusers import UNet2DConditionModel

CONFIG = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "cross_attention_dim": 8,
    "attention_head_dim": [2, 4],
    "transformer_layers_per_block": [1, 1],
    "norm_num_groups": 4,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 2,
    "projection_class_embeddings_input_dim": 16,
}


def kinds(shape, random):
    """The arguments of the writer for the ways in which a weight of `shape` can be stored."""
    rows, columns = shape[0], int(np.prod(shape[1:]))
    numel = rows * columns
    small = lambda *size: (0.1 * random.normal(size=size)).astype(np.float16)
    kept = lambda count: random.random(count) >= 0.4

    def palettes(bits, axis, size, length=1, **more):
        count = numel // length
        entries = small(shape[axis] // size, 2**bits, *([length] if length > 1 else []))
        return {"bits": bits, "axis": axis, "group_size": size, "palettes": entries, "indices": random.integers(0, 2**bits, count), "length": length} | more

    yield lambda: palettes(4, 0, rows)
    yield lambda: palettes(3, 0, 2, keep=kept(numel))
    yield lambda: palettes(6, 1, 2, scales=small(rows))
    yield lambda: palettes(4, 0, 4, length=2)
    yield lambda: palettes(8, 0, 4, length=4, keep=kept(numel // 4))
    yield lambda: {"keep": kept(numel), "values": small(numel)}
    yield lambda: palettes(2, 0, rows, scales=small(rows, -(-columns // 3)), block=3)
    yield lambda: palettes(1, 1, 4, keep=kept(numel), scales=small(rows))


def write(folder):
    """Writes container and decoded weights into `folder`; returns both paths."""
    random = np.random.default_rng(11)
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(CONFIG)
    writer = make_container.Writer(CONFIG, {}, [])
    number = 0
    for name, tensor in unet.state_dict().items():
        shape = list(tensor.shape)
        if len(shape) < 2 or name.startswith("conv_out"):
            values = random.normal(size=shape) * 0.1 + (name.endswith("weight") and len(shape) == 1)
            writer.tensor(name, values.astype(np.float16))
        else:
            of = list(kinds(shape, random))
            writer.weight(name, shape, **of[number % len(of)]())
            number += 1
    container, decoded = folder / "unet.squeezed.safetensors", folder / "decoded.safetensors"
    writer.finish(container, decoded)
    return container, decoded
