"""The tensors of a UNet under the names of single-file checkpoints, without `model.diffusion_model.`.

Source: `convert_ldm_unet_checkpoint` in diffusers' `loaders/single_file_utils.py`, as in `crates/model/src/ldm/names.rs`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "time_embedding.cond_proj": "time_embedding.cond_proj",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def ldm_names(names: Iterable[str]) -> dict[str, str]:
    """The stored names of the tensors `names` of a UNet in diffusers' names. The blocks are found in the names.

    Raises `ValueError` if a tensor has no name in such files.
    """
    names = list(names)
    modules = ENDS | dict(_modules(set(names)))
    return {name: _stored(name, modules) for name in names}


def _stored(name: str, modules: dict[str, str]) -> str:
    # A transformer's tensors lie deeper than its module: the longest path that is a module tells.
    path = name
    while path := path.rpartition(".")[0]:
        if path in modules:
            rest = name[len(path) + 1 :]
            return f"{modules[path]}.{rest}"
        resnet, _, leaf = path.rpartition(".")
        if leaf in RESNET and resnet in modules:
            rest = name[len(path) + 1 :]
            return f"{modules[resnet]}.{RESNET[leaf]}.{rest}"
    raise ValueError(f"`{name}` has no name in single-file checkpoints")


def _modules(names: set[str]) -> Iterator[tuple[str, str]]:
    """Input blocks, middle block and output blocks are numbered through; a block is a resnet, then the transformer that
    follows it, then the upsampling of the stage. A downsampling is a block of its own.
    """
    folders = {".".join(name.split(".")[:end]) for name in names for end in range(1, name.count(".") + 1)}
    block = 1
    for stage in _numbered("down_blocks", folders):
        for resnet, transformer in _pairs(stage, folders):
            yield resnet, f"input_blocks.{block}.0"
            yield transformer, f"input_blocks.{block}.1"
            block += 1
        if f"{stage}.downsamplers.0.conv" in folders:
            yield f"{stage}.downsamplers.0.conv", f"input_blocks.{block}.0.op"
            block += 1
    place = 0
    for resnet, transformer in _pairs("mid_block", folders):
        yield resnet, f"middle_block.{place}"
        yield transformer, f"middle_block.{place + 1}"
        place += 1 + (transformer in folders)
    block = 0
    for stage in _numbered("up_blocks", folders):
        transformer = ""
        for resnet, transformer in _pairs(stage, folders):
            yield resnet, f"output_blocks.{block}.0"
            yield transformer, f"output_blocks.{block}.1"
            block += 1
        place = 1 + (transformer in folders)
        yield f"{stage}.upsamplers.0.conv", f"output_blocks.{block - 1}.{place}.conv"


def _numbered(path: str, folders: set[str]) -> Iterator[str]:
    number = 0
    while f"{path}.{number}" in folders:
        yield f"{path}.{number}"
        number += 1


def _pairs(stage: str, folders: set[str]) -> Iterator[tuple[str, str]]:
    """The resnets of a stage, each with the path that its transformer has if there is one."""
    for number, resnet in enumerate(_numbered(f"{stage}.resnets", folders)):
        yield resnet, f"{stage}.attentions.{number}"
