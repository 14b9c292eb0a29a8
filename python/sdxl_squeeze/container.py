"""Reads containers, by docs/container.md: versions 1 and 2, with every check that the page asks for."""

from __future__ import annotations

import ctypes
import hashlib
import os
from collections.abc import Iterable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from .errors import ContainerError
from .layout import OF_VERSION_2, PARTS, Layout, LayoutError, parse
from .packed_weight import PackedWeight
from .safetensors_file import Entry, SafetensorsFile, parse_json

FORMAT = "sdxl-squeeze"
VERSIONS = ("1", "2")
# The metadata keys that tell the network of the file.
NETWORKS = {
    "unet_config": "unet",
    "text_encoder_config": "text_encoder",
    "text_encoder_2_config": "text_encoder_2",
    "vae_config": "vae",
}


class Container:
    """An open container whose header has been checked. Data stays in the file until it is asked for.

    Attributes:
        network: `unet`, `text_encoder`, `text_encoder_2` or `vae`.
        config: the network's `config.json`.
        recipe: the configuration that the network was compressed with.
        sources: the files that the weights came from, with `file`, `bytes` and `sha256`.
        prediction_type: what the UNet predicts, which a sampler must know; None if the file does not say.
        weights: how each compressed weight is stored, by name.
    """

    network: str
    config: dict[str, Any]
    recipe: Any
    sources: list[dict[str, Any]]
    prediction_type: str | None
    weights: dict[str, Layout]

    def __init__(self, file: SafetensorsFile, *, verify: bool = True) -> None:
        """The container in `file`, whose data is not looked at yet. Most callers want `open`."""
        self._file = file
        self._verify = verify
        self._read_metadata()
        self._check_parts()
        self._check_table()

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, verify: bool = True) -> Container:
        """Opens `path` and checks its header.

        With `verify`, the hash of its data is checked too, in one pass over the file, and later that of each weight that is
        decoded.

        Raises `ContainerError` if the file is no container or is damaged, `OSError` if it cannot be read.
        """
        file = SafetensorsFile(path)
        try:
            container = cls(file, verify=verify)
            if verify and file.data_sha256() != file.metadata["data_sha256"]:
                raise file.wrong("the data is damaged: it does not have the hash that `data_sha256` says")
        except BaseException:
            file.file.close()
            raise
        return container

    def close(self) -> None:
        """Closes the file."""
        self._file.file.close()

    def __enter__(self) -> Container:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @property
    def path(self) -> str | os.PathLike[str]:
        """The file."""
        return self._file.path

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the network's tensors by name, in the order of the file: uncompressed ones, then weights."""
        plain = {name: entry.shape for name, entry in self._file.entries.items() if not self._is_part(name)}
        return plain | {name: layout.shape for name, layout in self.weights.items()}

    def tensor(self, name: str) -> Tensor:
        """The tensor `name` of the network, decoded if it is compressed: fp16, on the CPU.

        Raises `KeyError` if there is none, `ContainerError` if it is damaged.
        """
        if name in self.weights:
            decoded = self.packed(name).decode()
            if self._verify and _sha256(decoded) != self.weights[name].sha256:
                raise self._file.wrong(f"`{name}` does not decode to the weight whose hash the file has")
            return decoded
        if name not in self._file.entries or self._is_part(name):
            raise KeyError(name)
        tensor = self._file.read(name).view(torch.float16).view(self._file.entries[name].shape)
        if not tensor.isfinite().all():
            raise self._file.wrong(f"`{name}` has values that are not finite")
        return tensor

    def packed(self, name: str) -> PackedWeight:
        """The compressed weight `name` as it is stored.

        Raises `KeyError` if there is none, `ContainerError` if it is damaged.
        """
        layout = self.weights[name]
        weight = PackedWeight(layout, {part: self._file.read(f"{name}.{part}") for part, *_ in layout.parts()})
        try:
            weight.check()
        except LayoutError as why:
            raise self._file.wrong(f"`{name}` {why}") from None
        return weight

    def _is_part(self, name: str) -> bool:
        weight, _, part = name.rpartition(".")
        return part in PARTS and weight in self.weights

    def _read_metadata(self) -> None:
        file, metadata = self._file, self._file.metadata
        if metadata.get("format") != FORMAT:
            raise file.wrong(f"not a container: its metadata does not say format = {FORMAT}")
        version = self._text("version")
        if version not in VERSIONS:
            raise file.wrong(f"a container of version `{version[:20]}`; versions 1 and 2 are read")
        rest = ((key, value) for key, value in metadata.items() if key != "metadata_sha256")
        # In the order of their bytes, which for UTF-8 is that of their characters.
        if self._text("metadata_sha256") != _lines_sha256(sorted(rest)):
            raise file.wrong("the metadata is damaged: it does not have the hash that `metadata_sha256` says")
        told = [key for key in NETWORKS if key in metadata]
        if len(told) != 1:
            raise file.wrong(f"the metadata has the config of {len(told)} networks, where a container has one")
        self.network = NETWORKS[told[0]]
        self.config = self._json(told[0], dict)
        self.recipe = self._json("recipe", object)
        self.sources = self._json("sources", list)
        self.prediction_type = metadata.get("prediction_type")
        self._text("data_sha256")
        self._read_weights(version)

    def _read_weights(self, version: str) -> None:
        rows = self._json("weights", dict)
        self.weights = {}
        is_new = False
        for name, row in rows.items():
            try:
                self.weights[name] = parse(row)
            except LayoutError as why:
                raise self._file.wrong(f"`{name}` {why}") from None
            keys = [key for key in OF_VERSION_2 if row.get(key) is not None]
            if keys and version == "1":
                raise self._file.wrong(f"`{name}` has a `{keys[0]}`, which version 1 does not know")
            is_new = is_new or bool(keys)
        # Equal weights have equal bytes: none has two versions.
        if version == "2" and not is_new:
            raise self._file.wrong("a container of version `2`, in which no weight has a `vector_length` or a `scale_block`")

    def _check_parts(self) -> None:
        rest = dict(self._file.entries)
        for name, layout in self.weights.items():
            for part, dtype, shape in layout.parts():
                entry = rest.pop(f"{name}.{part}", None)
                if entry is None:
                    raise self._file.wrong(f"`{name}.{part}` is missing")
                if (entry.dtype, entry.shape) != (dtype, shape):
                    have = f"{entry.dtype} {list(entry.shape)}"
                    raise self._file.wrong(f"`{name}.{part}` is {have}, but must be {dtype} {list(shape)}")
        for name, entry in rest.items():
            if name in self.weights or self._is_part(name):
                raise self._file.wrong(f"`{name}` does not belong there")
            if entry.dtype != "F16":
                raise self._file.wrong(f"`{name}` is {entry.dtype}; tensors that are no part of a compressed weight are F16")
            if 0 in entry.shape:
                raise self._file.wrong(f"`{name}` is of shape {list(entry.shape)}")

    def _check_table(self) -> None:
        def place(item: tuple[str, Entry]) -> tuple[int, int, str]:
            name, entry = item
            return entry.start, entry.end, name

        table = sorted(self._file.entries.items(), key=place)
        lines = ((name, f"{entry.dtype} {list(entry.shape)}") for name, entry in table)
        if self._text("tensors_sha256") != _lines_sha256(lines):
            raise self._file.wrong("the table of tensors is damaged: it does not have the hash that `tensors_sha256` says")

    def _text(self, key: str) -> str:
        if key not in self._file.metadata:
            raise self._file.wrong(f"the metadata lacks `{key}`")
        return self._file.metadata[key]

    def _json(self, key: str, kind: type) -> Any:
        value = parse_json(self.path, f"the metadata's `{key}`", self._text(key))
        if not isinstance(value, kind):
            raise self._file.wrong(f"the metadata's `{key}` is not a JSON {'array' if kind is list else 'object'}")
        return value


def _sha256(tensor: Tensor) -> str:
    """The hash of the bytes of a contiguous tensor on the CPU."""
    size = tensor.numel() * tensor.element_size()
    return hashlib.sha256((ctypes.c_char * size).from_address(tensor.data_ptr())).hexdigest()


def _lines_sha256(pairs: Iterable[tuple[str, str]]) -> str:
    digest = hashlib.sha256()
    for key, value in pairs:
        # A lone surrogate has no bytes in UTF-8: such a text was never hashed, and equals no hash.
        digest.update(f"{key}={value}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


__all__ = ["Container", "ContainerError", "Layout", "PackedWeight"]
