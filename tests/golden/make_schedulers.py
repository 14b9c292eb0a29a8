"""Writes results of diffusers' samplers, with which tests/it/schedulers.rs compares its own.

    python tests/golden/make_schedulers.py tests/golden/schedulers.safetensors

The script needs diffusers 0.42.1, torch and safetensors. It also writes schedulers.json, a list of
cases. Each case has the text of a scheduler_config.json, the name of the sampler that overrides it
(or null), and its numbers of steps.

The square roots of libtorch depend on the processor, and the tables of the samplers depend on the
roots. The tensor "roots" has those of linspace(0.01, 200, 1000). The Rust tests compute them too: if
they are equal, the results must be equal or nearly equal; otherwise wider bounds apply.

`predict` below takes the place of a UNet. Every run starts from the same noise [1, 4, 3, 5] times
`init_noise_sigma`. Each case NAME has these tensors, with its runs in the order of `steps`:

    NAME.timesteps  fp64 [sum of lengths]   the timesteps of all runs, one run after another
    NAME.lengths    int64 [runs]            the number of timesteps of each run
    NAME.init       fp64 [runs]             init_noise_sigma
    NAME.float32    fp32 [runs, 60]         the final sample of each run
    NAME.float64, NAME.float16, NAME.bfloat16  [60]  the final sample of the 20-step run in that kind
    NAME.trace      fp32 [steps, 60]        the sample after every step of the 5-step run (of some cases)
"""

import json
import logging
import pathlib
import sys

import diffusers
import torch
from safetensors.torch import save_file

SHAPE = (1, 4, 3, 5)
STEPS = [1, 2, 5, 20, 30, 50]
NAMES = {
    "euler": "EulerDiscreteScheduler",
    "ddim": "DDIMScheduler",
    "dpmpp-2m": "DPMSolverMultistepScheduler",
}


def predict(x, timestep):
    """A function in place of a model, computed in fp64 so that every implementation gets the same prediction."""
    wide = x.double()
    return (torch.sin(3 * wide + float(timestep) / 100) * 0.5 + 0.3 * wide).to(x.dtype)


def load(config, override):
    """Loads a sampler like a pipeline, and replaces it by another one if the case overrides it."""
    scheduler = getattr(diffusers, config["_class_name"]).from_config(dict(config))
    if override is None:
        return scheduler
    name = override.removesuffix("-karras")
    extra = {"use_karras_sigmas": True} if name != override else {}
    return getattr(diffusers, NAMES[name]).from_config(scheduler.config, **extra)


def run(config, override, steps, noise):
    scheduler = load(config, override)
    scheduler.set_timesteps(steps)
    if hasattr(scheduler, "set_begin_index"):  # as StableDiffusionXLPipeline does
        scheduler.set_begin_index(0)
    sample = noise * scheduler.init_noise_sigma
    trace = []
    for timestep in scheduler.timesteps:
        scaled = scheduler.scale_model_input(sample, timestep)
        sample = scheduler.step(predict(scaled, timestep), timestep, sample, return_dict=False)[0]
        trace.append(sample.flatten())
    assert sample.dtype == noise.dtype and sample.isfinite().all(), (config, override, steps)
    return scheduler, trace


SCALED = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
# The config of SDXL base 1.0, which contains keys of other classes.
SDXL = {
    **SCALED,
    "clip_sample": False,
    "interpolation_type": "linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "trained_betas": None,
    "use_karras_sigmas": False,
}
COSINE = {"beta_schedule": "squaredcos_cap_v2"}
TRAINED = {"num_train_timesteps": 60, "trained_betas": [round(0.002 + 0.0011 * i, 4) for i in range(60)]}
KARRAS = {"use_karras_sigmas": True}
EXPONENTIAL = {"use_exponential_sigmas": True}
V = {"prediction_type": "v_prediction"}
ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
RANGE = {"sigma_min": 0.05, "sigma_max": 11.5}

EULER = {
    "defaults": {},
    "sdxl": SDXL,
    "linspace": {**SDXL, "timestep_spacing": "linspace"},
    "trailing": {**SDXL, "timestep_spacing": "trailing"},
    "trained": {**TRAINED, "beta_schedule": "linear"},
    "cosine": COSINE,
    "v": {**SDXL, **V},
    "v-zero-snr": {**SDXL, **V, **ZERO_SNR},
    "zero-snr-leading": {**SDXL, "rescale_betas_zero_snr": True},
    "sample": {**SDXL, "prediction_type": "sample"},
    "karras": {**SDXL, **KARRAS},
    "karras-linspace": {**SCALED, **KARRAS},
    "karras-range": {**SDXL, **KARRAS, **RANGE},
    "karras-min-final": {**SDXL, **KARRAS, "final_sigmas_type": "sigma_min"},
    "karras-cosine": {**COSINE, **KARRAS},
    "exponential": {**SDXL, **EXPONENTIAL},
    "exponential-range": {**SCALED, **EXPONENTIAL, **RANGE},
    "log-linear": {**SDXL, "interpolation_type": "log_linear"},
    "log-linear-karras": {**SDXL, **KARRAS, "interpolation_type": "log_linear"},
    "sigma-min-final": {**SDXL, "final_sigmas_type": "sigma_min"},
    "continuous-v": {**SCALED, **V, **KARRAS, "timestep_type": "continuous", "sigma_min": 0.002, "sigma_max": 700.0},
    "continuous-epsilon": {**SDXL, "timestep_type": "continuous"},
    "range-without-curve": {**SDXL, **RANGE},
}
DDIM = {
    "defaults": {},
    "sdxl": SDXL,
    "clip": {**SDXL, "clip_sample": True, "clip_sample_range": 0.7},
    "linspace": {**SDXL, "timestep_spacing": "linspace"},
    "trailing": {**SDXL, "timestep_spacing": "trailing"},
    "alpha-to-one": {**SDXL, "set_alpha_to_one": True},
    "v": {**SDXL, **V},
    "v-zero-snr": {**SDXL, **V, **ZERO_SNR},
    "sample": {**SDXL, "prediction_type": "sample"},
    "cosine": {**COSINE, "clip_sample": False},
    "trained": {**TRAINED, "clip_sample": False},
}
DPM = {
    "defaults": {},
    "sdxl": SDXL,
    "linspace": {**SDXL, "timestep_spacing": "linspace"},
    "trailing": {**SDXL, "timestep_spacing": "trailing"},
    "first-order": {**SDXL, "solver_order": 1},
    "heun": {**SDXL, "solver_type": "heun"},
    "euler-at-final": {**SDXL, "euler_at_final": True, "final_sigmas_type": "sigma_min"},
    "full-order-final": {**SDXL, "lower_order_final": False, "final_sigmas_type": "sigma_min"},
    "sigma-min-final": {**SDXL, "final_sigmas_type": "sigma_min"},
    "karras": {**SDXL, **KARRAS},
    "karras-heun": {**SDXL, **KARRAS, "solver_type": "heun"},
    "karras-cosine": {**COSINE, **KARRAS},
    "karras-range": {**SDXL, **KARRAS, **RANGE},
    "exponential": {**SDXL, **EXPONENTIAL},
    "clipped-linspace": {**COSINE, "lambda_min_clipped": -5.1},
    "clipped-leading": {**COSINE, "lambda_min_clipped": -5.1, "timestep_spacing": "leading", "steps_offset": 2},
    "clipped-trailing": {**COSINE, "lambda_min_clipped": -5.1, "timestep_spacing": "trailing"},
    "v": {**SDXL, **V},
    "v-zero-snr": {**SDXL, **V, **ZERO_SNR},
    "sample": {**SDXL, "prediction_type": "sample"},
    "other-solvers-names": {**SDXL, "algorithm_type": "deis", "solver_type": "logrho", "final_sigmas_type": "sigma_min"},
    "trained": {**TRAINED, "beta_schedule": "squaredcos_cap_v2", **KARRAS},
}
# Each case has the class of the config, its keys, and the name of the sampler that overrides it.
OVERRIDDEN = {
    "euler-to-euler-karras": ("euler", SDXL, "euler-karras"),
    "euler-to-ddim": ("euler", SDXL, "ddim"),
    "euler-to-dpm": ("euler", SDXL, "dpmpp-2m"),
    "euler-to-dpm-karras": ("euler", SDXL, "dpmpp-2m-karras"),
    "euler-range-to-dpm-karras": ("euler", {**SDXL, **RANGE}, "dpmpp-2m-karras"),
    "euler-few-keys-to-ddim": ("euler", {"steps_offset": 1}, "ddim"),
    "ddim-few-keys-to-dpm": ("ddim", SCALED, "dpmpp-2m"),
    "ddim-to-euler": ("ddim", {**SDXL, "rescale_betas_zero_snr": True}, "euler"),
    "dpm-karras-to-euler": ("dpmpp-2m", {**SDXL, **KARRAS, "solver_order": 3}, "euler"),
    "dpm-to-ddim": ("dpmpp-2m", {**SCALED, "thresholding": False, "final_sigmas_type": "sigma_min"}, "ddim"),
}
# Further numbers of steps: some for which trailing spacing gives one step more, and the largest ones.
OTHER_STEPS = {
    "euler/trailing": STEPS + [61, 999],
    "euler/linspace": STEPS + [1000],
    "euler/sdxl": STEPS + [7, 1000],
    "ddim/trailing": STEPS + [7, 60],
    "ddim/linspace": STEPS + [1000],
    "ddim/sdxl": STEPS + [3, 999],
    "dpmpp-2m/trailing": STEPS + [14, 15, 61],
    "dpmpp-2m/linspace": STEPS + [3, 14, 15],
    "dpmpp-2m/sdxl": STEPS + [14, 15, 499],
}
TRACED = ["euler/sdxl", "euler/v-zero-snr", "euler/karras", "ddim/sdxl", "ddim/defaults", "dpmpp-2m/sdxl", "dpmpp-2m/karras-heun"]


def cases():
    for name, configs in {"euler": EULER, "ddim": DDIM, "dpmpp-2m": DPM}.items():
        for case, keys in configs.items():
            yield f"{name}/{case}", {"_class_name": NAMES[name], **keys}, None
    for case, (name, keys, override) in OVERRIDDEN.items():
        yield f"from-config/{case}", {"_class_name": NAMES[name], **keys}, override


def main(out):
    logging.disable(logging.WARNING)
    out = pathlib.Path(out)
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    tensors, index = {"noise": noise, "roots": torch.linspace(0.01, 200, 1000).sqrt()}, []
    for name, config, override in cases():
        steps = OTHER_STEPS.get(name, STEPS)
        index.append({"name": name, "config": config, "override": override, "steps": steps})
        runs = [run(config, override, count, noise) for count in steps]
        tensors[f"{name}.timesteps"] = torch.cat([scheduler.timesteps.double() for scheduler, _ in runs])
        tensors[f"{name}.lengths"] = torch.tensor([len(scheduler.timesteps) for scheduler, _ in runs])
        tensors[f"{name}.init"] = torch.tensor([float(scheduler.init_noise_sigma) for scheduler, _ in runs], dtype=torch.float64)
        tensors[f"{name}.float32"] = torch.stack([trace[-1] for _, trace in runs])
        for kind in ["float64", "float16", "bfloat16"]:
            tensors[f"{name}.{kind}"] = run(config, override, 20, noise.to(getattr(torch, kind)))[1][-1]
        if name in TRACED:
            tensors[f"{name}.trace"] = torch.stack(run(config, override, 5, noise)[1])
    save_file(tensors, out, metadata={"diffusers": diffusers.__version__, "torch": torch.__version__})
    lines = ",\n".join(json.dumps(case) for case in index)
    out.with_suffix(".json").write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main(sys.argv[1])
