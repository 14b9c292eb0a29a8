"""Containers as models of diffusers (0.42.1 and newer)."""

from __future__ import annotations

import os
from typing import Any, cast

import torch
from torch import nn

from diffusers import UNet2DConditionModel

from .container import Container
from .errors import ContainerError
from .packed_layers import PackedLayer, pack

__all__ = ["load_unet", "resident_bytes"]


def load_unet(
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.float16,
    device: torch.device | str = "cpu",
    verify: bool = True,
) -> UNet2DConditionModel:
    """The UNet of the container `path`, for a pipeline of diffusers.

    Compressed Linear and Conv2d layers keep their packed bytes and decode them when they are used, so that the model takes
    about the container's bytes of memory and, in a layer, those of its largest decoded weight. Weights and results are those
    of the folder that `sdxl-squeeze export --to diffusers` writes, to the last bit. The model is in evaluation mode, and its
    parameters ask for no gradients.

        unet = sdxl_squeeze.diffusers.load_unet("unet.squeezed.safetensors", device="cuda")
        pipeline = StableDiffusionXLPipeline.from_pretrained(model, unet=unet, torch_dtype=torch.float16)

    `dtype` is that of the computation: decoded weights are of it, and so are biases and norms. `verify` checks the hash of
    the file's data first.

    Raises `ContainerError` if the file is no container of a UNet, is damaged, or does not have the tensors of its own
    config; `OSError` if it cannot be read.
    """
    with Container.open(path, verify=verify) as container:
        unet = _skeleton(container)
        modules = dict(unet.named_modules())
        for name in container.weights:
            _pack(container, name, modules, dtype)
        plain = container.shapes().keys() - container.weights.keys()
        for name in sorted(plain):
            owner, _, leaf = name.rpartition(".")
            tensor = container.tensor(name).to(dtype)
            modules[owner]._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    return cast(UNet2DConditionModel, unet.eval().to(device))


def resident_bytes(model: nn.Module) -> int:
    """The bytes of memory of the parameters and buffers of `model`, packed ones included."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _skeleton(container: Container) -> nn.Module:
    """The UNet of the container's config without memory for its weights, if the file has just its tensors."""
    path, config = container.path, container.config
    if container.network != "unet" or config.get("_class_name") != "UNet2DConditionModel":
        what = config.get("_class_name", container.network)
        raise ContainerError(path, f"holds no UNet2DConditionModel but a {what}")
    shapes = container.shapes()
    _check_size(container, len(shapes))
    try:
        with torch.device("meta"):
            unet = cast(nn.Module, UNet2DConditionModel.from_config(config))  # type: ignore[no-untyped-call]
    # The config is the file's: any of its values may be of a kind or size that diffusers does not expect.
    except (ArithmeticError, AssertionError, AttributeError, LookupError, NotImplementedError, RuntimeError, TypeError, ValueError) as why:
        raise ContainerError(path, f"diffusers makes no UNet of its `unet_config`: {why}") from why
    wanted = {name: tuple(tensor.shape) for name, tensor in unet.state_dict().items()}
    for name in sorted(wanted.keys() | shapes.keys()):
        if wanted.get(name) != shapes.get(name):
            have, needed = (str(list(of[name])) if name in of else "none" for of in (shapes, wanted))
            raise ContainerError(path, f"`{name}`: the file has {have}, the UNet of its config {needed}")
    return unet


def _check_size(container: Container, tensors: int) -> None:
    """Refuses a config of far more blocks than the file has tensors, before they are made.

    Each resnet and each block of a transformer has tensors of its own. The count takes the largest number of each list for
    all levels, so that a UNet with few large levels may seem to have more blocks than tensors.
    """
    levels = container.config.get("block_out_channels")
    count = len(levels) if isinstance(levels, list) else 0
    keys = ("layers_per_block", "transformer_layers_per_block", "reverse_transformer_layers_per_block")
    layers, *depths = (_numbers(container.config.get(key)) for key in keys)
    if count * max(1, layers) * max(1, *depths) > 16 * tensors:
        raise ContainerError(container.path, f"its `unet_config` has far more blocks than the file has tensors ({tensors})")


def _numbers(value: Any) -> int:
    """The largest whole number in `value`, which may be a list of lists; 0 if there is none."""
    if isinstance(value, list):
        return max(map(_numbers, value), default=0)
    return value if isinstance(value, int) else 0


def _pack(container: Container, name: str, modules: dict[str, nn.Module], dtype: torch.dtype) -> None:
    owner, _, leaf = name.rpartition(".")
    module = modules[owner]
    if leaf != "weight" or type(module) not in (nn.Linear, nn.Conv2d):
        raise ContainerError(container.path, f"`{name}` is compressed, which only weights of Linear and Conv2d may be")
    assert isinstance(module, nn.Linear | nn.Conv2d) and not isinstance(module, PackedLayer)
    pack(module, container.packed(name), dtype)
