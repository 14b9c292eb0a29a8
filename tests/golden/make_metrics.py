"""Computes PSNR and SSIM of pairs of small pictures with scikit-image.

    python make_metrics.py SAMPLES.png metrics.safetensors metrics.json

SAMPLES.png is the emoji model's samples.png (64x64 pictures, each pixel twice as large). Pairs are stored as uint8 [h, w, 3].
"""
import json
import sys

import numpy as np
import skimage
from PIL import Image
from safetensors.numpy import save_file
from scipy.ndimage import gaussian_filter
from skimage.metrics import peak_signal_noise_ratio, structural_similarity


def pairs(samples):
    random = np.random.default_rng(7)
    sheet = np.asarray(Image.open(samples).convert("RGB"))[::2, ::2]
    emoji = lambda row, column: sheet[64 * row:64 * row + 64, 64 * column:64 * column + 64]
    byte = lambda x: np.clip(np.rint(x), 0, 255).astype(np.uint8)
    noise = lambda shape, deviation: random.normal(0, deviation, shape)
    cat, other = emoji(0, 0), emoji(1, 2)
    y, x = np.mgrid[0:80, 0:65]
    ramp = np.stack([3 * x, 255 - 2 * y, x + y], -1)
    yield "faint_noise", cat, byte(cat + noise(cat.shape, 2))
    yield "strong_noise", cat, byte(cat + noise(cat.shape, 60))
    yield "blurred", cat, byte(gaussian_filter(cat.astype(float), (1.2, 1.2, 0)))
    yield "moved", cat, np.roll(cat, (1, 2), (0, 1))
    yield "another_picture", cat, other
    yield "darker", cat, byte(0.8 * cat.astype(float))
    yield "negative", cat, 255 - cat
    yield "one_value", cat, np.where(np.arange(cat.size).reshape(cat.shape) == 5000, cat ^ 1, cat).astype(np.uint8)
    yield "ramp", byte(ramp), byte(ramp + noise(ramp.shape, 9))
    yield "smallest", byte(noise((11, 11, 3), 40) + 128), byte(noise((11, 11, 3), 40) + 128)
    yield "wide", byte(noise((12, 90, 3), 50) + 90), byte(noise((12, 90, 3), 20) + 120)
    yield "black_and_white", np.zeros((64, 64, 3), np.uint8), np.full((64, 64, 3), 255, np.uint8)
    yield "equal", other, other.copy()


def main(samples, tensors, out):
    stored, cases = {}, {}
    for name, a, b in pairs(samples):
        stored[f"{name}.a"], stored[f"{name}.b"] = np.ascontiguousarray(a), np.ascontiguousarray(b)
        equal = np.array_equal(a, b)
        psnr = None if equal else peak_signal_noise_ratio(a, b, data_range=255)
        ssim = structural_similarity(a, b, channel_axis=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255)
        cases[name] = {"psnr": None if equal else float(psnr), "ssim": float(ssim)}
    save_file(stored, tensors)
    with open(out, "w") as file:
        json.dump({"made_with": f"scikit-image {skimage.__version__}", "cases": cases}, file, indent=1)
        file.write("\n")


main(*sys.argv[1:])
