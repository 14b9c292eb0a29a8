#!/usr/bin/env python3
"""Writes a first corpus for every target into fuzz/corpus/, from the files of tests/golden/, tests/attacks/, configs/ and calibration/.

The corpus itself is not kept in the repository: this makes it again in a second.
"""

import struct
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent


def seed(target, content, count=[0]):
    folder = HERE / "corpus" / target
    folder.mkdir(parents=True, exist_ok=True)
    count[0] += 1
    (folder / f"seed-{count[0]:04}").write_bytes(content)


def files(pattern):
    # Larger files are mutated too slowly to be worth it.
    return [path.read_bytes() for path in sorted(ROOT.glob(pattern)) if path.is_file() and path.stat().st_size <= 16 << 10]


def package(folder):
    good = ROOT / "tests/attacks/good/package.mlpackage"
    names = ["Manifest.json", "Data/com.apple.CoreML/model.mlmodel", "Data/com.apple.CoreML/weights/weight.bin"]
    parts = [(folder if (folder / name).exists() else good) / name for name in names]
    manifest, model, weights = [part.read_bytes() for part in parts]
    # The first byte asks for three files as they are, the two numbers are the lengths of the first two.
    return b"\x03" + struct.pack("<HH", len(manifest), len(model)) + manifest + model + weights


# The first byte of an input says what the rest is: see each target.
for content in files("tests/attacks/safetensors/*") + files("tests/attacks/good/*.safetensors"):
    seed("safetensors", b"\0" + content)
    if len(content) > 8:
        length = min(struct.unpack("<Q", content[:8])[0], len(content) - 8)
        seed("safetensors", b"\1" + struct.pack("<H", length) + content[8:])
for content in files("tests/attacks/container/*") + files("tests/attacks/good/container*") + files("tests/golden/container/*.squeezed.safetensors"):
    seed("container", b"\0" + content)
    seed("container", b"\1" + content)
for content in files("tests/attacks/samples/*") + files("tests/attacks/good/samples*"):
    seed("samples", b"\0" + content)
for folder in sorted((ROOT / "tests/attacks/package").iterdir()):
    seed("package", package(folder))
for content in files("configs/**/*.yaml") + files("tests/attacks/config/*"):
    seed("yaml", content)
for content in files("calibration/*.txt") + files("tests/attacks/prompts/*"):
    seed("prompts", content)
for number, pattern in enumerate(["unet/config", "text_encoder*/config", "vae/config", "scheduler/scheduler_config"]):
    for content in files(f"tests/golden/*/{pattern}.json") + files(f"models/*/{pattern}.json"):
        seed("config_json", bytes([number]) + content)
for content in files("tests/attacks/unet_config/*"):
    seed("config_json", b"\0" + content)
for content in files("tests/golden/lora/*.safetensors"):
    seed("lora", b"\0\0" + content)
    length = struct.unpack("<Q", content[:8])[0]
    if length < 1 << 16:
        seed("lora", b"\0\1" + struct.pack("<H", length) + content[8:])
for content in files("tests/attacks/safetensors/*") + files("tests/golden/single-file/*.safetensors"):
    seed("single_file", b"\0" + content)
    seed("lora", b"\0\0" + content)

# Decisions by which a target puts its file together: a few of every first byte.
for target in ["safetensors", "container", "samples", "package", "single_file", "lora"]:
    for number in range(64):
        seed(target, bytes((number * 7 + at * at * 31 + at // 3) % 256 if at else number for at in range(96)))
