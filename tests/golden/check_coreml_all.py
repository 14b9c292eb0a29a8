"""Compresses the bundled model with every config, writes Core ML packages of it, and checks them with check_coreml.py.

    python check_coreml_all.py ../../target/release/sdxl-squeeze coreml/checked.json

Calibration takes few samples, because the packages are checked and not the quality. A run takes seven minutes.
"""

import json
import pathlib
import subprocess
import sys
import tempfile

from check_coreml import Stored, forward, loader, values
from mil_torch import Package

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent.parent
KINDS = {
    "linear, diffusers": [],
    "linear, apple, batch 1, 16x24 latents": ["--io", "apple", "--batch", "1", "--height", "128", "--width", "192"],
    "split-einsum, apple": ["--layout", "split-einsum", "--io", "apple"],
}


def check(squeeze, source, kinds, folder):
    found = {}
    stored = Stored(source)
    for kind, options in kinds.items():
        package = folder / f"{len(list(folder.glob('*.mlpackage')))}.mlpackage"
        subprocess.run([squeeze, "export", source, "--to", "coreml", "--out", package, *options], check=True, stdout=subprocess.DEVNULL)
        subprocess.run([squeeze, "verify", package], check=True, stdout=subprocess.DEVNULL)
        program, row = loader(package)
        row |= values(program, stored) | forward(Package(package), stored)
        row["bytes"] = sum(file.stat().st_size for file in package.rglob("*") if file.is_file())
        found[kind] = row
        print(source.name, kind, row, flush=True)
    return found


def main(squeeze, out):
    squeeze = pathlib.Path(squeeze).resolve()
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        for config in sorted((ROOT / "configs").rglob("*.yaml")):
            name = str(config.relative_to(ROOT / "configs").with_suffix(""))
            target = folder / name.replace("/", "-")
            command = [squeeze, "compress", "--config", config, "--model", ROOT / "models/emoji-sdxl", "--out", target]
            if not config.stem.startswith("dense"):
                command += ["--prompts", ROOT / "calibration/emoji.txt", "--calibration-nsamples", "8", "--steps", "4"]
            # The configs give the path of the captions relative to the root of the repository.
            subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            found[name] = check(squeeze, target / "unet.squeezed.safetensors", KINDS, folder)
        dense = {"linear, diffusers": KINDS["linear, diffusers"], "split-einsum, apple": KINDS["split-einsum, apple"]}
        found["dense fp16"] = check(squeeze, ROOT / "models/emoji-sdxl", dense, folder)
        for name in ("base-like", "refiner-like", "v-prediction"):
            found[f"{name}, dense fp16"] = check(squeeze, HERE / name, dense, folder)
    pathlib.Path(out).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
