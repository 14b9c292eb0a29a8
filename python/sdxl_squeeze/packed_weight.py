"""A compressed weight as it is stored, and its decoding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .bits import count_ones, has_stray_bits, unpack
from .layout import Layout, LayoutError


@dataclass(frozen=True)
class PackedWeight:
    """The parts of a compressed weight: uint8 tensors with the bytes of the file, by the names of the parts.

    fp16 parts are bytes too, so that no change of a module's dtype touches them.
    """

    layout: Layout
    parts: Mapping[str, Tensor]

    def check(self) -> None:
        """Checks what the sizes of the parts do not tell. Raises `LayoutError`; the message continues the weight's name."""
        layout = self.layout
        kept = layout.kept // layout.vector_length
        if layout.masked:
            mask = self.parts["mask"]
            if has_stray_bits(mask, 1, layout.numel // layout.vector_length):
                raise LayoutError("has bits set after the last of its mask")
            if (ones := count_ones(mask)) != kept:
                raise LayoutError(f"has a mask that keeps {ones}, but there are {kept} values")
        if layout.bits is not None and has_stray_bits(self.parts["indices"], layout.bits, kept):
            raise LayoutError("has bits set after its last index")
        for part in ("palettes", "scales", "values"):
            if part in self.parts and not self._halves(part).isfinite().all():
                raise LayoutError(f"has {part} that are not finite")
        # A palette's entry times a scale may overflow.
        if layout.scaled and not self.decode().isfinite().all():
            raise LayoutError("has scaled values that are not finite")

    def _halves(self, part: str) -> Tensor:
        return self.parts[part].view(torch.float16)

    def _keep(self) -> Tensor | None:
        if not self.layout.masked:
            return None
        return unpack(self.parts["mask"], 1, self.layout.numel // self.layout.vector_length).bool()

    def decode(self) -> Tensor:
        """The dense weight, fp16, on the device of the parts. Every bit is as docs/container.md defines it."""
        layout, keep = self.layout, self._keep()
        if layout.bits is None:
            assert keep is not None, "a weight without palettes has a mask: its layout was checked"
            dense = torch.zeros(layout.numel, dtype=torch.float16, device=keep.device)
            return dense.masked_scatter_(keep, self._halves("values")).view(layout.shape)
        values = self._looked_up(self._indices(layout.bits, keep), layout.bits)
        if layout.scaled:
            values = self._scaled(values)
        if keep is not None:
            # Vectors lie along the rows: [o / V, V, columns].
            rows = values.view(-1, layout.vector_length, layout.columns)
            rows.masked_fill_(~keep.view(-1, 1, layout.columns), 0.0)
        return values.view(layout.shape)

    def _indices(self, bits: int, keep: Tensor | None) -> Tensor:
        """The indices of all vectors, int32; 0 where a vector is pruned."""
        layout = self.layout
        kept = unpack(self.parts["indices"], bits, layout.kept // layout.vector_length)
        if keep is not None:
            kept = torch.zeros(keep.shape, dtype=torch.uint8, device=keep.device).masked_scatter_(keep, kept)
        return kept.int()

    def _looked_up(self, indices: Tensor, bits: int) -> Tensor:
        """The palettes' values at `indices`: fp16 [o, columns]."""
        layout = self.layout
        groups = torch.arange(layout.groups, dtype=torch.int32, device=indices.device) * 2**bits
        # [groups, ...] along output channels, [o, groups, ...] along input channels.
        if layout.axis == 0:
            indices = indices.view(layout.groups, -1) + groups[:, None]
        else:
            indices = indices.view(layout.shape[0], layout.groups, -1) + groups[None, :, None]
        palettes = self._halves("palettes").view(-1, layout.vector_length)
        values = palettes.index_select(0, indices.flatten())
        if layout.vector_length > 1:
            values = values.view(-1, layout.columns, layout.vector_length).transpose(1, 2).contiguous()
        return values.reshape(layout.shape[0], layout.columns)

    def _scaled(self, values: Tensor) -> Tensor:
        """`values` times their scales: exact in fp32, and rounded once to fp16."""
        layout = self.layout
        scales = self._halves("scales").float().view(layout.shape[0], -1)
        if layout.scale_block is not None:
            scales = scales.repeat_interleave(layout.scale_block, dim=1)[:, : layout.columns]
        return (values.float() * scales).half()
