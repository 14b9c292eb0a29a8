"""What the tests share: the golden files of the Rust tests, and the writer that made them."""

from __future__ import annotations

import json
import pathlib
import struct
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests/golden"
sys.path[:0] = [str(ROOT / "python"), str(GOLDEN)]


def read_halves(path):
    """The fp16 tensors of a plain safetensors file, as numpy arrays."""
    blob = pathlib.Path(path).read_bytes()
    (length,) = struct.unpack("<Q", blob[:8])
    header, data = json.loads(blob[8 : 8 + length]), blob[8 + length :]
    header.pop("__metadata__", None)
    return {name: np.frombuffer(data[slice(*entry["data_offsets"])], "<f2").reshape(entry["shape"]) for name, entry in header.items()}


@pytest.fixture(scope="session")
def squeezed_unet(tmp_path_factory):
    """A small UNet of diffusers, compressed in every way by the writer of the golden files: container and dense weights."""
    from tiny_unet import write

    return write(tmp_path_factory.mktemp("unet"))
