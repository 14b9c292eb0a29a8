"""How a compressed weight is stored: an entry of the metadata's `weights` (docs/container.md, sections 2 and 3)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from . import bits as bit_stream
from .safetensors_file import is_count

LONGEST_VECTOR = 16
# The keys of an entry that only version 2 has.
OF_VERSION_2 = ("vector_length", "scale_block")
KEYS = {"shape", "kept", "masked", "bits", "axis", "group_size", "scaled", "sha256", "report", *OF_VERSION_2}
PARTS = ("mask", "indices", "palettes", "scales", "values")


class LayoutError(ValueError):
    """An entry of `weights` that contradicts itself. The message continues the weight's name."""


@dataclass(frozen=True)
class Layout:
    """A checked entry of `weights`.

    `bits`, `axis` and `group_size` are None if the weight is pruned and not palettized. `scale_block` is None if a row has
    one scale, or none.
    """

    shape: tuple[int, ...]
    kept: int
    masked: bool
    bits: int | None
    axis: int
    group_size: int
    vector_length: int
    scaled: bool
    scale_block: int | None
    sha256: str

    @property
    def numel(self) -> int:
        """The number of elements of the dense weight."""
        return math.prod(self.shape)

    @property
    def columns(self) -> int:
        """The number of elements of an output channel."""
        return self.numel // self.shape[0]

    @property
    def groups(self) -> int:
        """The number of groups of channels, each with a palette."""
        return self.shape[self.axis] // self.group_size

    def parts(self) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        """The tensors that the weight consists of: part, dtype and shape."""
        vectors = self.numel // self.vector_length
        if self.masked:
            yield "mask", "U8", (bit_stream.byte_count(vectors, 1),)
        if self.bits is None:
            yield "values", "F16", (self.kept,)
            return
        yield "indices", "U8", (bit_stream.byte_count(self.kept // self.vector_length, self.bits),)
        palettes = (self.groups, 2**self.bits)
        yield "palettes", "F16", palettes if self.vector_length == 1 else (*palettes, self.vector_length)
        if self.scaled:
            rows = (self.shape[0],)
            yield "scales", "F16", rows if self.scale_block is None else (*rows, -(-self.columns // self.scale_block))


def parse(row: Any) -> Layout:
    """Checks an entry of `weights`. Raises `LayoutError`."""
    if not isinstance(row, dict):
        raise LayoutError("is not an object")
    if unknown := sorted(row.keys() - KEYS):
        raise LayoutError(f"has an unknown key `{unknown[0]}`, which could change what the parts mean")
    # An absent key and null are the same.
    row = {key: value for key, value in row.items() if value is not None}
    if missing := sorted({"shape", "kept", "masked", "sha256"} - row.keys()):
        raise LayoutError(f"lacks `{missing[0]}`")
    shape = row["shape"]
    if not isinstance(shape, list) or not shape or not all(is_count(n) and n > 0 for n in shape):
        raise LayoutError(f"is of shape {shape}, which is not the shape of a weight")
    numel = math.prod(shape)
    # Two bytes each, in one allocation.
    if numel >= 1 << 62:
        raise LayoutError(f"is of shape {shape}, which overflows")
    for key in ("kept", "bits", "axis", "group_size", *OF_VERSION_2):
        if key in row and not is_count(row[key]):
            raise LayoutError(f"has a `{key}` that is not a whole number from 0")
    if not isinstance(row["masked"], bool) or not isinstance(row.get("scaled", False), bool):
        raise LayoutError("has a `masked` or `scaled` that is neither true nor false")
    if not isinstance(row["sha256"], str):
        raise LayoutError("has a `sha256` that is not text")
    kept, masked = row["kept"], row["masked"]
    if kept > numel or (not masked and kept != numel):
        raise LayoutError(f"says that {kept} elements are kept of {numel}")
    given = [key for key in ("bits", "axis", "group_size") if key in row]
    if len(given) not in (0, 3):
        raise LayoutError("must have all of bits, axis and group_size, or none")
    layout = Layout(
        shape=tuple(shape),
        kept=kept,
        masked=masked,
        bits=row.get("bits"),
        axis=row.get("axis", 0),
        group_size=row.get("group_size", shape[0]),
        vector_length=row.get("vector_length", 1),
        scaled=row.get("scaled", False),
        scale_block=row.get("scale_block"),
        sha256=row["sha256"],
    )
    if layout.bits is None:
        _check_pruned(layout, "vector_length" in row)
    else:
        _check_palettized(layout)
    return layout


def _check_pruned(layout: Layout, has_vectors: bool) -> None:
    if not layout.masked:
        raise LayoutError("is neither pruned nor palettized")
    if has_vectors or layout.scaled or layout.scale_block is not None:
        raise LayoutError("has vectors or scales but no palettes")


def _check_palettized(layout: Layout) -> None:
    axis, size, length = layout.axis, layout.group_size, layout.vector_length
    if layout.bits not in bit_stream.WIDTHS:
        raise LayoutError(f"has indices of {layout.bits} bits, which are not supported")
    if axis > 1 or axis >= len(layout.shape):
        raise LayoutError(f"has groups along axis {axis}, which cannot be grouped")
    if size == 0 or layout.shape[axis] % size:
        raise LayoutError(f"has {layout.shape[axis]} channels, which groups of {size} do not divide")
    if not 1 <= length <= LONGEST_VECTOR:
        raise LayoutError(f"has vectors of {length}, which is not between 1 and {LONGEST_VECTOR}")
    if length > 1 and (axis != 0 or size % length or layout.scaled):
        raise LayoutError(f"has vectors of {length}, which need groups of output channels that they divide, and no scales")
    if layout.kept % length:
        raise LayoutError(f"says that {layout.kept} elements are kept, which are no vectors of {length}")
    if layout.scale_block is not None and not (layout.scaled and 1 <= layout.scale_block < layout.columns):
        raise LayoutError(f"has a `scale_block` of {layout.scale_block} for {layout.columns} columns")
