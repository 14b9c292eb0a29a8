"""Linear and Conv2d layers whose weight stays packed, and is decoded each time that it is used."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .layout import Layout
from .packed_weight import PackedWeight


class PackedLayer(nn.Module):
    """What both kinds of layers share: the parts of the weight as buffers of bytes.

    The parts move with the module to other devices and stay as they are under changes of its dtype, which decide the dtype
    of the decoded weight. A state dict has the decoded weight, so that `save_pretrained` writes a usual model.
    """

    _layout: Layout

    def hold(self, weight: PackedWeight, dtype: torch.dtype) -> None:
        """Takes `weight` in the place of the dense one, which is dropped. The decoded weight is of `dtype`."""
        del self._parameters["weight"]
        self._layout = weight.layout
        for part, stored in weight.parts.items():
            self.register_buffer(f"packed_{part}", stored, persistent=False)
        # Changes of the module's dtype reach this empty buffer.
        self.register_buffer("_of_dtype", torch.empty(0, dtype=dtype), persistent=False)

    @property
    def packed(self) -> PackedWeight:
        """The weight as it is stored."""
        parts = {part: self._buffers[f"packed_{part}"] for part, *_ in self._layout.parts()}
        return PackedWeight(self._layout, {part: stored for part, stored in parts.items() if stored is not None})

    @property
    def weight(self) -> Tensor:
        """The decoded weight, new each time."""
        dtype = self._of_dtype.dtype
        return self.packed.decode().to(dtype)  # type: ignore[arg-type]

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.weight
        super()._save_to_state_dict(destination, prefix, keep_vars)


class PackedLinear(PackedLayer, nn.Linear):  # type: ignore[override]
    """A Linear layer whose weight stays packed."""


class PackedConv2d(PackedLayer, nn.Conv2d):  # type: ignore[override]
    """A Conv2d layer whose weight stays packed."""


def pack(layer: nn.Linear | nn.Conv2d, weight: PackedWeight, dtype: torch.dtype) -> None:
    """Turns `layer` into a packed one, which has all its other attributes. The shape of `weight` is that of the layer's.

    The class is changed in place, as `torch.nn.utils.parametrize` does it: the layer's forward then reads `weight` from the
    property.
    """
    layer.__class__ = PackedLinear if isinstance(layer, nn.Linear) else PackedConv2d
    assert isinstance(layer, PackedLayer)
    layer.hold(weight, dtype)
