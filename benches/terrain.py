#!/usr/bin/env python3
"""Palettes of vectors against palettes of single values on the weights of a second, independently
trained diffusion U-Net: adaptive-terrain-diffusion from PyPI (ONNX, MIT).

    python3 -m venv venv && venv/bin/pip install onnx safetensors numpy adaptive-terrain-diffusion==0.4.2
    venv/bin/python benches/terrain.py

It reads the weights of all convolutions and linear layers, writes them to a temporary safetensors
file, and runs the example `weight_palettes` on it, which prints a table.
"""

import importlib.util
import pathlib
import subprocess
import tempfile

import numpy as np
import onnx
from onnx import numpy_helper
from safetensors.numpy import save_file

ROOT = pathlib.Path(__file__).resolve().parent.parent


def weights():
    package = importlib.util.find_spec("terrain_diffusion")
    if package is None:
        raise SystemExit("adaptive-terrain-diffusion is not installed: see the head of this script")
    folder = pathlib.Path(package.submodule_search_locations[0]) / "weights"
    (path,) = folder.glob("*.onnx")
    arrays = ((tensor.name, numpy_helper.to_array(tensor)) for tensor in onnx.load(path).graph.initializer)
    return {name: np.ascontiguousarray(array, np.float32) for name, array in arrays if array.ndim in (2, 4)}


with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "weights.safetensors"
    save_file(weights(), path)
    subprocess.run(
        ["cargo", "run", "--quiet", "--release", "--example", "weight_palettes", "--", str(path)], cwd=ROOT, check=True
    )
