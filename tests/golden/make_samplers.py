"""Writes what diffusers' further samplers compute, for tests/it/samplers.rs to compare with.

    python tests/golden/make_samplers.py tests/golden/samplers.safetensors

needs diffusers 0.42.1, torch, torchsde 0.2.6 and safetensors. Beside the tensors it writes samplers.json: a list of cases, each with a
scheduler_config.json, the name under which it is overridden (or null), the eta that its steps are given (or null), and its numbers of
steps.

The model is `predict` of make_schedulers.py. As in a pipeline, one generator with seed 7 draws the first noise [1, 4, 3, 5], and then
all noise of the steps. For each case NAME the tensors are, with the runs in the order of `steps`:

    NAME.timesteps  fp64 [sum of lengths]   all runs' timesteps, one run after another
    NAME.lengths    int64 [runs]            how many each run has
    NAME.init       fp64 [runs]             init_noise_sigma
    NAME.float32    fp32 [runs, 60]         each run's final sample
    NAME.float16    fp16 [60]               the final sample of the 4-step run in fp16

    python tests/golden/make_samplers.py tests/golden/samplers-pipelines.safetensors tests/golden/base-like

writes the final latents of whole pipelines instead: the cases of PIPELINES by name, whose settings are in the JSON file.

    python tests/golden/make_samplers.py tests/golden/samplers-pictures.safetensors tests/golden/base-like tests/golden/architectures

writes the final latents of image to image and of inpainting, with the picture and the mask of the last folder, for every sampler:
NAME/image@0.6 and NAME/mask@0.6, where 0.6 is the strength; some also at other strengths, and as NAME/inpainting@0.6 by the UNet of
inpainting-like, which is told of the mask.

    python tests/golden/make_samplers.py tests/golden/samplers-further.safetensors

writes the cases of FURTHER in the form of the first: settings that few models have, which also need scipy.

The Brownian tree of DPM++ SDE is seeded with 7 too, except where a config has `noise_sampler_seed`.
"""

import json
import logging
import pathlib
import sys

import diffusers
import torch
from PIL import Image
from safetensors.torch import save_file

from make_schedulers import COSINE, EXPONENTIAL, KARRAS, RANGE, SCALED, SDXL, SHAPE, TRAINED, V, ZERO_SNR, predict

SEED = 7
STEPS = [1, 4, 8, 20]
CLASSES = {
    "euler-ancestral": "EulerAncestralDiscreteScheduler",
    "lcm": "LCMScheduler",
    "tcd": "TCDScheduler",
    "ddim": "DDIMScheduler",
    "dpmpp-2m-sde": "DPMSolverMultistepScheduler",
    "ddpm": "DDPMScheduler",
    "dpmpp-sde": "DPMSolverSDEScheduler",
    "unipc": "UniPCMultistepScheduler",
    "heun": "HeunDiscreteScheduler",
    "plms": "PNDMScheduler",
    "edm-euler": "EDMEulerScheduler",
    "edm-dpmpp-2m": "EDMDPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "dpmpp-2m": "DPMSolverMultistepScheduler",
}
# What a name sets besides the class.
SETS = {"dpmpp-2m-sde": {"algorithm_type": "sde-dpmsolver++"}, "plms": {"skip_prk_steps": True}}

TRAILING = {"timestep_spacing": "trailing"}
LINSPACE = {"timestep_spacing": "linspace"}
SAMPLE = {"prediction_type": "sample"}
MIN = {"final_sigmas_type": "sigma_min"}
SDE = {**SDXL, **SETS["dpmpp-2m-sde"]}
PLMS = {**SDXL, **SETS["plms"]}
# The scheduler configs of SDXL Turbo, of LCM-SDXL and of Playground v2.5, without diffusers' notes.
TURBO = {**SDXL, **TRAILING, "steps_offset": 1, "use_karras_sigmas": False}
LCM = {**SDXL, "original_inference_steps": 50, "timestep_scaling": 10.0, "rescale_betas_zero_snr": False, "thresholding": False}
PLAYGROUND = {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5, "rho": 7.0, "num_train_timesteps": 1000, "solver_order": 2}

CASES = {
    "euler-ancestral": {
        "defaults": {},
        "turbo": TURBO,
        "leading": SDXL,
        "linspace": {**SDXL, **LINSPACE},
        "cosine": {**COSINE, "timestep_spacing": "leading", "steps_offset": 1},
        "v-zero-snr": {**SDXL, **V, **ZERO_SNR},
    },
    "lcm": {
        "defaults": {},
        "sdxl": LCM,
        "scaling": {**LCM, "timestep_scaling": 0.003},
        "original-33": {**LCM, "original_inference_steps": 33},
        "clip": {**LCM, "clip_sample": True, "clip_sample_range": 0.7},
        "v": {**LCM, **V},
        "v-zero-snr": {**LCM, **V, "rescale_betas_zero_snr": True},
        "sample": {**LCM, **SAMPLE},
        "linear": {"beta_schedule": "linear"},
    },
    "tcd": {
        "defaults": {},
        "sdxl": LCM,
        "v": {**LCM, **V},
        "v-zero-snr": {**LCM, **V, "rescale_betas_zero_snr": True},
        "sample": {**LCM, **SAMPLE},
        "clip-without-effect": {**LCM, "clip_sample": True, "clip_sample_range": 0.7},
    },
    "ddim": {"eta": SDXL, "eta-v-trailing": {**SDXL, **V, **TRAILING}, "eta-clip": {**SDXL, "clip_sample": True}},
    "dpmpp-2m-sde": {
        "defaults": SETS["dpmpp-2m-sde"],
        "sdxl": SDE,
        "trailing": {**SDE, **TRAILING},
        "karras": {**SDE, **KARRAS},
        "exponential-linear": {**SETS["dpmpp-2m-sde"], **EXPONENTIAL},
        "heun": {**SDE, "solver_type": "heun"},
        "first-order": {**SDE, "solver_order": 1},
        "sigma-min-final": {**SDE, **MIN, "lower_order_final": False},
        "v-zero-snr": {**SDE, **V, **ZERO_SNR},
        "sample": {**SDE, **SAMPLE},
    },
    "ddpm": {
        "defaults": {},
        "sdxl": SDXL,
        "linspace": {**SDXL, **LINSPACE},
        "trailing": {**SDXL, **TRAILING},
        "fixed-small-log": {**SDXL, "variance_type": "fixed_small_log"},
        "fixed-large": {**SDXL, "variance_type": "fixed_large"},
        "clip": {**SDXL, "clip_sample": True, "clip_sample_range": 0.7},
        "v-zero-snr": {**SDXL, **V, **ZERO_SNR},
        "sample": {**SDXL, **SAMPLE},
        "laplace": {"beta_schedule": "laplace"},
        "sigmoid": {"beta_schedule": "sigmoid", "clip_sample": False},
    },
    "dpmpp-sde": {
        "defaults": {},
        "sdxl": SDXL,
        "linspace": {**SDXL, **LINSPACE},
        "trailing": {**SDXL, **TRAILING},
        "karras": {**SDXL, **KARRAS},
        "karras-ignores-range": {**SDXL, **KARRAS, **RANGE},
        "exponential": {**SDXL, **EXPONENTIAL},
        "exponential-range": {**SCALED, **EXPONENTIAL, **RANGE},
        "seed": {**SDXL, "noise_sampler_seed": 123456789012},
        "v": {**SDXL, **V, "rescale_betas_zero_snr": True},
        "cosine": {**COSINE, "timestep_spacing": "leading", "steps_offset": 1},
        "trained": {**TRAINED, **TRAILING},
    },
    "unipc": {
        "defaults": {},
        "sdxl": SDXL,
        "linspace": {**SDXL, **LINSPACE},
        "trailing": {**SDXL, **TRAILING},
        "first-order": {**SDXL, "solver_order": 1},
        "third-order": {**SDXL, "solver_order": 3},
        "third-order-sigma-min": {**SDXL, **MIN, "solver_order": 3, "lower_order_final": False},
        "bh1": {**SDXL, **MIN, "solver_type": "bh1"},
        "of-noise": {**SDXL, **MIN, "predict_x0": False},
        "of-noise-v": {**SDXL, **MIN, **V, "predict_x0": False},
        "uncorrected": {**SDXL, "disable_corrector": [0, 2]},
        "karras": {**SDXL, **KARRAS},
        "karras-cosine": {**COSINE, **KARRAS},
        "v-zero-snr": {**SDXL, **V, **ZERO_SNR},
        "sample": {**SDXL, **SAMPLE},
        "trained": {**TRAINED, **TRAILING},
    },
    "heun": {
        "defaults": {},
        "sdxl": SDXL,
        "linspace": {**SDXL, **LINSPACE},
        "trailing": {**SDXL, **TRAILING},
        "karras": {**SDXL, **KARRAS},
        "exponential": {**SDXL, **EXPONENTIAL},
        "clip": {**SDXL, "clip_sample": True, "clip_sample_range": 0.7},
        "v": {**SDXL, **V, "rescale_betas_zero_snr": True},
        "sample": {**SDXL, **SAMPLE},
        "exp": {"beta_schedule": "exp", **TRAILING},
    },
    "plms": {
        "defaults": SETS["plms"],
        "sdxl": PLMS,
        "trailing": {**PLMS, **TRAILING},
        "linspace": {**PLMS, **LINSPACE},
        "alpha-to-one": {**PLMS, "set_alpha_to_one": True, "steps_offset": 0},
        "v": {**PLMS, **V, "rescale_betas_zero_snr": True},
    },
    "edm-euler": {
        "defaults": {},
        "playground": PLAYGROUND,
        "exponential": {"sigma_schedule": "exponential", "sigma_data": 0.8, "sigma_max": 20.0},
        "v-sigma-min": {**V, **MIN, "rho": 3.5},
    },
    "edm-dpmpp-2m": {
        "defaults": {},
        "playground": PLAYGROUND,
        "heun": {"solver_type": "heun"},
        "first-order": {"solver_order": 1},
        "exponential": {"sigma_schedule": "exponential", "sigma_data": 0.8, "sigma_max": 20.0},
        "v-sigma-min": {**V, **MIN, "rho": 3.5},
        "sde": {"algorithm_type": "sde-dpmsolver++"},
        "sde-heun": {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun", "euler_at_final": True},
        "deis": {"algorithm_type": "deis", "solver_type": "logrho", **MIN},
    },
}
BETA = {"use_beta_sigmas": True}
LU = {"use_lu_lambdas": True}
THIRD = {"solver_order": 3}
NOISE = {"algorithm_type": "dpmsolver", **MIN}
NOISE_SDE = {"algorithm_type": "sde-dpmsolver", **MIN}
THRESHOLD = {"thresholding": True, "sample_max_value": 1.5, "dynamic_thresholding_ratio": 0.9}
FURTHER = {
    "euler": {"beta": {**SDXL, **BETA}, "beta-range": {**SCALED, **BETA, **RANGE}, "beta-linspace-v": {**SDXL, **BETA, **LINSPACE, **V}},
    "heun": {"beta": {**SDXL, **BETA}},
    "dpmpp-sde": {"beta": {**SDXL, **BETA}},
    "unipc": {
        "beta": {**SDXL, **BETA},
        "threshold": {**SDXL, **THRESHOLD},
        "threshold-of-noise": {**SDXL, **MIN, **THRESHOLD, "predict_x0": False},
    },
    "dpmpp-2m": {
        "beta": {**SDXL, **BETA},
        "beta-range": {**SDXL, **BETA, **RANGE},
        "lu": {**SDXL, **LU},
        "lu-before-exponential": {**SDXL, **LU, **EXPONENTIAL, **RANGE},
        "karras-before-lu": {**SDXL, **LU, **KARRAS},
        "lu-cosine": {**COSINE, **LU},
        "third-order": {**SDXL, **THIRD},
        "third-order-full": {**SDXL, **THIRD, **MIN, "lower_order_final": False},
        "third-order-karras-v": {**SDXL, **THIRD, **KARRAS, **V},
        "third-order-sde": {**SDE, **THIRD},
        "third-order-of-noise": {**SDXL, **THIRD, **NOISE},
        "of-noise": {**SDXL, **NOISE},
        "of-noise-heun-v": {**SDXL, **NOISE, **V, "solver_type": "heun"},
        "of-noise-first-order-sample": {**SDXL, **NOISE, **SAMPLE, "solver_order": 1},
        "of-noise-sde": {**SDXL, **NOISE_SDE},
        "of-noise-sde-heun": {**SDXL, **NOISE_SDE, "solver_type": "heun"},
        "threshold": {**SDXL, **THRESHOLD},
        "threshold-defaults": {**SDXL, "thresholding": True},
        "threshold-of-noise": {**SDXL, **NOISE, **THRESHOLD},
    },
    "edm-dpmpp-2m": {"third-order": THIRD, "threshold": {**PLAYGROUND, **THRESHOLD}},
    "ddim": {"threshold": {**SDXL, **THRESHOLD}, "threshold-before-clip": {**SDXL, **THRESHOLD, "clip_sample": True}},
    "ddpm": {"threshold": {**SDXL, **THRESHOLD}},
    "lcm": {"threshold": {**LCM, **THRESHOLD}},
}
# Etas of the steps; other cases of these classes have 0, as in a pipeline.
ETAS = {"tcd": 0.3, "ddim": 0.6, "tcd/v": 1.0, "tcd/sample": 0.0}
# Class of the file, its keys, the name it is overridden with.
OVERRIDDEN = {
    f"euler-to-{name}": ("euler", SDXL, name)
    for name in ["euler-ancestral", "lcm", "tcd", "dpmpp-2m-sde", "dpmpp-2m-sde-karras", "dpmpp-sde", "dpmpp-sde-karras", "ddpm"]
    + ["unipc", "unipc-karras", "heun", "heun-karras", "plms", "edm-euler", "edm-dpmpp-2m"]
}
OVERRIDDEN["lcm-few-keys-to-heun"] = ("lcm", {"steps_offset": 1}, "heun")
OVERRIDDEN["tcd-few-keys-to-lcm"] = ("tcd", {"original_inference_steps": 40}, "lcm")


def load(config, override):
    scheduler = getattr(diffusers, config["_class_name"]).from_config(dict(config))
    if override is None:
        return seeded(scheduler)
    name = override.removesuffix("-karras")
    extra = {**SETS.get(name, {}), **(KARRAS if name != override else {})}
    return seeded(getattr(diffusers, CLASSES[name]).from_config(scheduler.config, **extra))


def seeded(scheduler):
    """With the seed of the run, where the tree's would come from torch's global generator."""
    if getattr(scheduler, "noise_sampler_seed", SEED) is None:
        scheduler.noise_sampler_seed = SEED
    return scheduler


def run(config, override, eta, steps, kind):
    scheduler = load(config, override)
    scheduler.set_timesteps(steps)
    if hasattr(scheduler, "set_begin_index"):  # as StableDiffusionXLPipeline does
        scheduler.set_begin_index(0)
    generator = torch.Generator().manual_seed(SEED)
    sample = torch.randn(SHAPE, generator=generator, dtype=kind) * scheduler.init_noise_sigma
    takes = scheduler.step.__code__.co_varnames[: scheduler.step.__code__.co_argcount]
    extra = {key: value for key, value in [("generator", generator), ("eta", eta or 0.0)] if key in takes}
    for timestep in scheduler.timesteps:
        scaled = scheduler.scale_model_input(sample, timestep)
        sample = scheduler.step(predict(scaled, timestep), timestep, sample, return_dict=False, **extra)[0].to(kind)
    assert sample.isfinite().all(), (config, override, steps)
    return scheduler, sample.flatten()


def cases(of):
    for name, configs in of.items():
        for case, keys in configs.items():
            yield f"{name}/{case}", {"_class_name": CLASSES[name], **keys}, None, ETAS.get(f"{name}/{case}", ETAS.get(name))
    for case, (name, keys, override) in OVERRIDDEN.items() if of is CASES else ():
        yield f"from-config/{case}", {"_class_name": CLASSES[name], **keys}, override, None


def main(out):
    out = pathlib.Path(out)
    tensors, index = {}, []
    for name, config, override, eta in cases(FURTHER if out.stem.endswith("further") else CASES):
        index.append({"name": name, "config": config, "override": override, "eta": eta, "steps": STEPS})
        runs = [run(config, override, eta, count, torch.float32) for count in STEPS]
        tensors[f"{name}.timesteps"] = torch.cat([scheduler.timesteps.double() for scheduler, _ in runs])
        tensors[f"{name}.lengths"] = torch.tensor([len(scheduler.timesteps) for scheduler, _ in runs])
        tensors[f"{name}.init"] = torch.tensor([float(scheduler.init_noise_sigma) for scheduler, _ in runs], dtype=torch.float64)
        tensors[f"{name}.float32"] = torch.stack([sample for _, sample in runs])
        tensors[f"{name}.float16"] = run(config, override, eta, 4, torch.float16)[1]
    save_file(tensors, out, metadata={"diffusers": diffusers.__version__, "torch": torch.__version__})
    lines = ",\n".join(json.dumps(case) for case in index)
    out.with_suffix(".json").write_text(f"[\n{lines}\n]\n")


PROMPT = "a picture of a cat's face, 2 red apples & a dog!"
PIPELINES = {
    "turbo": {"scheduler": "euler-ancestral", "timestep_spacing": "trailing", "steps": 4, "guidance": 0.0},
    "lcm": {"scheduler": "lcm", "steps": 4, "guidance": 1.0},
    "tcd": {"scheduler": "tcd", "steps": 4, "guidance": 0.0, "eta": 0.3},
    "dpmpp-2m-sde": {"scheduler": "dpmpp-2m-sde-karras", "steps": 8, "guidance": 4.0, "negative_prompt": "Blurry, LOW quality!!"},
    "ddim-eta": {"scheduler": "ddim", "steps": 5, "guidance": 3.0, "eta": 1.0},
    "heun": {"scheduler": "heun", "steps": 4, "guidance": 4.0},
    "dpmpp-sde": {"scheduler": "dpmpp-sde-karras", "steps": 6, "guidance": 4.0},
    "rescaled": {"scheduler": "euler", "steps": 8, "guidance": 7.0, "guidance_rescale": 0.7},
    "rescaled-wholly": {"scheduler": "unipc", "steps": 5, "guidance": 7.0, "guidance_rescale": 1.0},
}


def pipelines(out, folder):
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(folder, torch_dtype=torch.float32, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    given, tensors = pipe.scheduler.config, {}
    for name, case in PIPELINES.items():
        bare = case["scheduler"].removesuffix("-karras")
        extra = {**SETS.get(bare, {}), **(KARRAS if bare != case["scheduler"] else {})}
        if "timestep_spacing" in case:
            extra["timestep_spacing"] = case["timestep_spacing"]
        pipe.scheduler = seeded(getattr(diffusers, CLASSES[bare]).from_config(given, **extra))
        tensors[name] = pipe(
            PROMPT, negative_prompt=case.get("negative_prompt"), num_inference_steps=case["steps"], guidance_scale=case["guidance"],
            guidance_rescale=case.get("guidance_rescale", 0.0), eta=case.get("eta", 0.0), height=64, width=64, output_type="latent",
            generator=torch.Generator().manual_seed(SEED)).images
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out)
    pathlib.Path(out).with_suffix(".json").write_text(json.dumps({"prompt": PROMPT, "seed": SEED, "cases": PIPELINES}, indent=1) + "\n")


def pictures(out, folder, architectures):
    base = diffusers.StableDiffusionXLPipeline.from_pretrained(folder, torch_dtype=torch.float32, add_watermarker=False)
    parts = {name: part for name, part in base.components.items() if name not in ("image_encoder", "feature_extractor")}
    picture, mask = (Image.open(pathlib.Path(architectures, name)) for name in ("image.png", "mask.png"))
    told = diffusers.UNet2DConditionModel.from_pretrained(pathlib.Path(architectures, "inpainting-like/unet"), torch_dtype=torch.float32)
    inpaint = diffusers.StableDiffusionXLInpaintPipeline
    ways = {
        "image": (diffusers.StableDiffusionXLImg2ImgPipeline, parts, {}),
        "mask": (inpaint, parts, {"mask_image": mask}),
        "inpainting": (inpaint, {**parts, "unet": told}, {"mask_image": mask}),
    }
    cases = [(name, what, 0.6) for name in CLASSES if name != "dpmpp-2m" for what in ("image", "mask")]
    cases += [(name, "image", strength) for name in ("plms", "unipc", "dpmpp-sde") for strength in (0.2, 0.8, 1.0)]
    cases += [(name, "mask", 1.0) for name in ("lcm", "dpmpp-sde", "plms", "edm-euler")]
    cases += [(name, "inpainting", strength) for name in ("euler-ancestral", "dpmpp-sde", "heun") for strength in (0.6, 1.0)]
    tensors = {}
    for name, what, strength in cases:
        pipeline, given_parts, given = ways[what]
        pipe = pipeline(**given_parts, add_watermarker=False)
        pipe.set_progress_bar_config(disable=True)
        pipe.scheduler = seeded(getattr(diffusers, CLASSES[name]).from_config(base.scheduler.config, **SETS.get(name, {})))
        tensors[f"{name}/{what}@{strength}"] = pipe(
            PROMPT, image=picture, strength=strength, num_inference_steps=5, guidance_scale=4.0, output_type="latent",
            generator=torch.Generator().manual_seed(SEED), **given).images
    for name, tensor in tensors.items():
        assert tensor.isfinite().all(), name
        print(f"{name}: std {tensor.std():.3f} max {tensor.abs().max():.2f}")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out)


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    [main, pipelines, pictures][len(sys.argv) - 2](*sys.argv[1:])
