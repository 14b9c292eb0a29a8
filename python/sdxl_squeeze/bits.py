"""Streams of small numbers: the lowest bit first, without padding (docs/container.md, bit order)."""

from __future__ import annotations

import torch
from torch import Tensor

WIDTHS = (1, 2, 3, 4, 6, 8)


def byte_count(count: int, bits: int) -> int:
    """The bytes that `count` numbers of `bits` bits take."""
    return -(-count * bits // 8)


def unpack(stream: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` numbers of `bits` bits (one of `WIDTHS`) in the bytes `stream`: uint8 [count]."""
    if bits == 8:
        return stream[:count]
    numbers: Tensor
    if 8 % bits == 0:
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=stream.device)
        numbers = (stream[:, None] >> shifts) & (2**bits - 1)
    else:
        # Three bytes hold a whole number of 3-bit and of 6-bit numbers.
        padded = torch.nn.functional.pad(stream, (0, -len(stream) % 3)).view(-1, 3).int()
        words = padded[:, 0] | (padded[:, 1] << 8) | (padded[:, 2] << 16)
        shifts = torch.arange(0, 24, bits, dtype=torch.int32, device=stream.device)
        numbers = ((words[:, None] >> shifts) & (2**bits - 1)).to(torch.uint8)
    return numbers.flatten()[:count]


def has_stray_bits(stream: Tensor, bits: int, count: int) -> bool:
    """Whether a bit is set after the last of `count` numbers. `stream` has `byte_count(count, bits)` bytes."""
    used = count * bits % 8
    return used != 0 and int(stream[-1]) >> used != 0


def count_ones(stream: Tensor) -> int:
    """The number of set bits of the bytes `stream`."""
    ones = torch.tensor([n.bit_count() for n in range(256)], dtype=torch.uint8, device=stream.device)
    # In pieces: indices take four bytes each.
    total = 0
    for start in range(0, len(stream), 1 << 20):
        total += int(ones.index_select(0, stream[start : start + (1 << 20)].int()).sum())
    return total
