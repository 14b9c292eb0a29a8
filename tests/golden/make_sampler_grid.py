"""Writes results of diffusers' Euler, DDIM and DPM++ samplers for a grid of settings, with which tests/it/schedulers.rs compares its own.

    python tests/golden/make_sampler_grid.py tests/golden/sampler-grid.json

The script needs diffusers 0.42.1, torch, scipy and safetensors. Every line of the file is a setting: the keys that differ from those
of SDXL base 1.0, two numbers of steps from 1 to 25, and for each the four numbers of the final sample. `make_schedulers.py` has the
function that takes the place of a UNet. The runs are in fp32 and start from NOISE times `init_noise_sigma`.
"""

import itertools
import json
import logging
import pathlib
import sys

import torch
from make_schedulers import NAMES, SDXL, run

NOISE = torch.tensor([0.625, -1.125, 0.3125, 1.75]).reshape(1, 1, 2, 2)
SPACINGS = ["leading", "trailing", "linspace"]
CURVES = ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"]
PREDICTIONS = ["epsilon", "v_prediction", "sample"]
SOLVERS = [
    {"solver_order": 2},
    {"solver_order": 2, "solver_type": "heun", "prediction_type": "v_prediction"},
    {"solver_order": 3},
    {"solver_order": 1, "prediction_type": "sample", "final_sigmas_type": "sigma_min"},
]


def settings():
    curves = [{}, *({curve: True} for curve in CURVES)]
    for spacing, curve, prediction in itertools.product(SPACINGS, curves, PREDICTIONS):
        yield "euler", {"timestep_spacing": spacing, **curve, "prediction_type": prediction}
    for spacing, curve, solver in itertools.product(SPACINGS, [*curves, {"use_lu_lambdas": True}], SOLVERS):
        yield "dpmpp-2m", {"timestep_spacing": spacing, **curve, **solver}
    for spacing, prediction, alpha, clip in itertools.product(SPACINGS, PREDICTIONS, [False, True], [False, True]):
        yield "ddim", {"timestep_spacing": spacing, "prediction_type": prediction, "set_alpha_to_one": alpha, "clip_sample": clip}


def main(out):
    logging.disable(logging.WARNING)
    lines = []
    for number, (name, keys) in enumerate(settings()):
        config = {"_class_name": NAMES[name], **SDXL, **keys}
        steps = [1 + 7 * number % 25, 1 + (7 * number + 12) % 25]
        finals = [run(config, None, count, NOISE)[1][-1].tolist() for count in steps]
        lines.append(json.dumps({"class": NAMES[name], "keys": keys, "steps": steps, "final": finals}))
    head = json.dumps({"sdxl": SDXL, "noise": NOISE.flatten().tolist()})[:-1]
    pathlib.Path(out).write_text(head + ', "settings": [\n' + ",\n".join(lines) + "\n]}\n")


if __name__ == "__main__":
    main(sys.argv[1])
