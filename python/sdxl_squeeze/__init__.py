"""Compressed networks of Stable Diffusion XL, read in Python.

The wheel has the program `sdxl-squeeze`, which writes containers (`*.squeezed.safetensors`), and this package, which reads
them:

- `sdxl_squeeze.load(path)` decodes a container into tensors, with torch alone;
- `sdxl_squeeze.container.Container` reads single tensors, decoded or packed;
- `sdxl_squeeze.diffusers.load_unet(path)` makes a `UNet2DConditionModel` whose weights stay packed.

Importing the package imports no torch: the program's launcher has to start at once.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from .errors import ContainerError

if TYPE_CHECKING:
    import torch

__all__ = ["ContainerError", "__version__", "load"]


def load(path: str | os.PathLike[str], *, verify: bool = True) -> dict[str, torch.Tensor]:
    """Decodes the container `path`.

    Returns the tensors of the network by their names in the checkpoint, as dense fp16 tensors on the CPU: the weights that
    `sdxl-squeeze export --to diffusers` writes, to the last bit. All kinds of weights of versions 1 and 2 are read: palettes
    of 1 to 8 bits for groups along both axes, palettes of vectors, masks, plain sparse values, scales for channels and for
    blocks of columns.

    `verify` checks the hash of the data in a pass over the file before anything is read from it, and that of each decoded
    weight.

    Raises `ContainerError` if the file is no container or is damaged, and `OSError` if it cannot be read.
    """
    from .container import Container

    with Container.open(path, verify=verify) as container:
        return {name: container.tensor(name) for name in container.shapes()}


def __getattr__(name: str) -> str:
    if name == "__version__":
        from importlib.metadata import version

        return version("sdxl-squeeze")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
