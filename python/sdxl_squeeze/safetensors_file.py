"""The safetensors format: a header of JSON, then the data of all tensors without gaps.

Source: https://github.com/huggingface/safetensors (`safetensors/src/tensor.rs`), whose checks are made here too.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch
from torch import Tensor

from .errors import ContainerError

# As the safetensors library has it.
LONGEST_HEADER = 100_000_000
# The dtypes of containers, with the bytes of an element.
SIZES = {"F16": 2, "U8": 1}
PIECE = 8 << 20


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies in the data, in bytes, and what it is."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class SafetensorsFile:
    """An open safetensors file whose header has been checked against the length of the file."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Opens `path` and reads its header.

        Raises `ContainerError` if it is not a whole safetensors file of fp16 and uint8 tensors, `OSError` if it cannot be
        read.
        """
        self.path = path
        self.file: BinaryIO = open(path, "rb")
        try:
            self._read_header()
        except BaseException:
            self.file.close()
            raise

    def _read_header(self) -> None:
        total = os.fstat(self.file.fileno()).st_size
        first = self.file.read(8)
        length = struct.unpack("<Q", first)[0] if len(first) == 8 else 0
        if not 2 <= length <= min(LONGEST_HEADER, total - 8):
            raise self.wrong("not a whole safetensors file: its header would be longer than the file, or is empty")
        text = self.file.read(length)
        self.data_start = 8 + length
        self.data_length = total - self.data_start
        header = parse_json(self.path, "the header", text)
        if not isinstance(header, dict):
            raise self.wrong("not a whole safetensors file: its header is not an object")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise self.wrong("`__metadata__` is not an object of strings")
        self.metadata: dict[str, str] = metadata
        self.entries = {name: self._entry(name, entry) for name, entry in header.items()}
        end = 0
        for name, entry in sorted(self.entries.items(), key=lambda item: (item[1].start, item[1].end)):
            if entry.start != end:
                raise self.wrong(f"`{name}` begins at {entry.start}, where the tensor before it ends at {end}")
            end = entry.end
        if end != self.data_length:
            raise self.wrong(f"not a whole safetensors file: it has {self.data_length} bytes of data, its header knows {end}")

    def _entry(self, name: str, entry: Any) -> Entry:
        try:
            dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            known = len(entry) == 3 and dtype in SIZES
            whole = all(is_count(n) for n in (*shape, start, end))
        except (TypeError, KeyError, ValueError):
            known = whole = False
        if not known or not whole:
            raise self.wrong(f"`{name}` is not an F16 or U8 tensor with a shape and two offsets")
        if math.prod(shape) * SIZES[dtype] != end - start or any(n >= 1 << 63 for n in shape):
            raise self.wrong(f"`{name}` of shape {list(shape)} does not fit its {end - start} bytes")
        return Entry(dtype, tuple(shape), start, end)

    def wrong(self, problem: str) -> ContainerError:
        """An error about this file."""
        return ContainerError(self.path, problem)

    def data_sha256(self) -> str:
        """The hash of all data, in one pass over the file."""
        digest = hashlib.sha256()
        for piece in self._pieces():
            digest.update(piece)
        return digest.hexdigest()

    def _pieces(self) -> Iterator[memoryview]:
        self.file.seek(self.data_start)
        buffer = memoryview(bytearray(PIECE))
        while count := self.file.readinto(buffer):  # type: ignore[attr-defined]
            yield buffer[:count]

    def read(self, name: str) -> Tensor:
        """The bytes of the tensor `name`: uint8 [bytes]."""
        entry = self.entries[name]
        if entry.start == entry.end:
            return torch.empty(0, dtype=torch.uint8)
        content = bytearray(entry.end - entry.start)
        self.file.seek(self.data_start + entry.start)
        if self.file.readinto(content) != len(content):  # type: ignore[attr-defined]
            raise self.wrong(f"the file became shorter while `{name}` was read")
        return torch.frombuffer(content, dtype=torch.uint8)


def is_count(value: object) -> bool:
    """Whether `value` is a whole number from 0; JSON's true and false are none."""
    return type(value) is int and value >= 0


def parse_json(path: str | os.PathLike[str], what: str, text: str | bytes) -> Any:
    """The value of `text`, a part `what` of the file `path`."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ContainerError(path, f"{what} is nested too deeply") from None
    except ValueError as why:
        raise ContainerError(path, f"{what} is not JSON: {why}") from None
