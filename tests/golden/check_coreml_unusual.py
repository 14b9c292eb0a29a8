"""Compresses the small golden pipelines with unusual settings, writes Core ML packages, and checks them with check_coreml.py.

    python check_coreml_unusual.py ../../target/release/sdxl-squeeze coreml/checked-unusual.json

The settings are those that no shipped config has: every number of bits with groups of one channel and of none, palettes along input
channels, scales, vectors, masks alone, and mixtures. Each package is of another kind of `check_coreml_all.py`, in turns. coremltools
opens the package and gives every tensor bit for bit as it is in the container; mil_torch.py evaluates it.
"""

import json
import pathlib
import subprocess
import sys
import tempfile

from check_coreml_all import KINDS, check

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent.parent
MODELS = ("base-like", "refiner-like", "v-prediction")


def grouped(n_bits, group_size, **more):
    return {"n_bits": n_bits, "granularity": "per_grouped_channel", "group_size": group_size, **more}


def palettes(**settings):
    return {"palettize": {"on_misfit": "smaller_group", "weight_threshold": 100, "global_config": settings}}


def mask(**settings):
    return {"prune": {"global_config": settings}}


def settings():
    for bits in (1, 2, 3, 4, 6, 8):
        yield palettes(n_bits=bits)
    for bits, size in ((1, 1), (2, 1), (3, 2), (4, 4), (6, 8), (8, 3)):
        yield palettes(**grouped(bits, size))
    for bits, size in ((1, 4), (2, 1), (3, 8), (4, 2), (6, 4)):
        yield palettes(**grouped(bits, size, channel_axis=1))
    for bits, size in ((1, 4), (2, 8), (4, 1), (8, 4)):
        yield palettes(**grouped(bits, size, enable_per_channel_scale=True))
    yield palettes(n_bits=3, enable_per_channel_scale=True)
    for bits, vector in ((2, 2), (4, 2), (3, 4), (6, 4)):
        yield palettes(n_bits=bits, cluster_dim=vector)
    for share in (0.03, 0.5, 0.97):
        yield mask(target_sparsity=share)
    yield mask(n_m_ratio=[2, 4])
    yield mask(target_sparsity=0.5) | palettes(n_bits=1)
    yield mask(target_sparsity=0.9) | palettes(**grouped(8, 4))
    yield mask(n_m_ratio=[1, 4]) | palettes(**grouped(3, 4))
    yield mask(target_sparsity=0.4) | palettes(n_bits=4, cluster_dim=2)
    yield mask(target_sparsity=0.4) | palettes(**grouped(2, 4, channel_axis=1))
    yield mask(target_sparsity=0.6) | palettes(**grouped(4, 4, enable_per_channel_scale=True))
    some = {r"mid_block\..*": None, r".*attn2.*": grouped(2, 2), r".*conv.*": {"n_bits": 8}}
    yield {"palettize": {"on_misfit": "dense", "weight_threshold": 0, "global_config": grouped(6, 4), "module_name_configs": some}}


def main(squeeze, out):
    squeeze = pathlib.Path(squeeze).resolve()
    found = []
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        for number, config in enumerate(settings()):
            model, target = HERE / MODELS[number % 3], folder / str(number)
            kind = list(KINDS)[number % len(KINDS)]
            target.mkdir()
            (target / "config.yaml").write_text(json.dumps(config))
            command = [squeeze, "compress", "--config", target / "config.yaml", "--model", model, "--out", target / "out"]
            command += ["--prompts", ROOT / "calibration/emoji.txt", "--calibration-nsamples", "4", "--steps", "4"]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            rows = check(squeeze, target / "out/unet.squeezed.safetensors", {kind: KINDS[kind]}, target)
            found.append({"config": config, "model": model.name, "kind": kind, **rows[kind]})
    pathlib.Path(out).write_text("[\n" + ",\n".join(map(json.dumps, found)) + "\n]\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
