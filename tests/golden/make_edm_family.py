"""Single-file checkpoints like Playground v2.5, CosXL and CosXL Edit in small, and what diffusers draws with them.

    python make_edm_family.py CLIP OUT

CLIP is as in make_family.py. The weights are those of its checkpoint, with the tensors that mark the model; CosXL Edit has 8 input
channels. OUT.json gets markers and settings, OUT.safetensors the latents and the pictures.

Playground is read by `from_single_file` with configs whose sampler and scale of latents are the published ones. CosXL is read the
same way; its sampler is set as diffusers' documentation sets it.
"""
import json
import sys
import tempfile
from pathlib import Path

import torch
from diffusers import EDMDPMSolverMultistepScheduler, EDMEulerScheduler, StableDiffusionXLInstructPix2PixPipeline, StableDiffusionXLPipeline
from make_family import SETTINGS, pipeline_of, shapes_of, values
from PIL import Image
from safetensors.torch import save_file

HERE = Path(__file__).parent
# vae/config.json and scheduler/scheduler_config.json of playgroundai/playground-v2.5-1024px-aesthetic.
MEAN, STD = [-1.6574, 1.886, -1.383, 2.5155], [8.4927, 5.9022, 6.5498, 5.2299]
PLAYGROUND = dict(
    algorithm_type="dpmsolver++", dynamic_thresholding_ratio=0.995, euler_at_final=False, final_sigmas_type="zero", lower_order_final=True,
    num_train_timesteps=1000, prediction_type="epsilon", rho=7.0, sample_max_value=1.0, sigma_data=0.5, sigma_max=80.0, sigma_min=0.002,
    solver_order=2, solver_type="midpoint", thresholding=False)
COSXL = dict(sigma_min=0.002, sigma_max=120.0, sigma_data=1.0, prediction_type="v_prediction", sigma_schedule="exponential")
SIGMAS = {"edm_vpred.sigma_max": 120.0, "edm_vpred.sigma_min": 0.002}


def drawn(pipe, **options):
    pipe.set_progress_bar_config(disable=True)
    return [pipe(SETTINGS["prompt"], negative_prompt=SETTINGS["negative_prompt"], num_inference_steps=SETTINGS["steps"],
                 guidance_scale=SETTINGS["guidance"], height=SETTINGS["size"], width=SETTINGS["size"], output_type=output,
                 generator=torch.Generator().manual_seed(SETTINGS["seed"]), **options).images for output in ("latent", "pt")]


def main(clip, out):
    edit = dict(image=Image.open(HERE / "architectures/image.png"), image_guidance_scale=1.5)
    variants = {
        "playground": (dict(scaling_factor=0.5, latents_mean=MEAN, latents_std=STD),
                       {"edm_mean": torch.tensor(MEAN).view(1, 4, 1, 1), "edm_std": torch.tensor(STD).view(1, 4, 1, 1)},
                       EDMDPMSolverMultistepScheduler(**PLAYGROUND), StableDiffusionXLPipeline, {}),
        "cosxl": ({}, {name: torch.tensor(value) for name, value in SIGMAS.items()},
                  EDMEulerScheduler(**COSXL), StableDiffusionXLPipeline, {}),
        "cosxl-edit": (dict(in_channels=8), {name: torch.tensor(value) for name, value in SIGMAS.items()},
                       EDMEulerScheduler(**COSXL), StableDiffusionXLInstructPix2PixPipeline, edit),
    }
    keep, notes = {}, dict(SETTINGS, image_guidance=1.5, markers={})
    for name, (traits, markers, scheduler, kind, options) in variants.items():
        pipeline = pipeline_of(clip, **traits)
        pipeline.scheduler = scheduler
        made = {key: values(key, shape) for key, shape in shapes_of(pipeline).items()} | markers
        with tempfile.TemporaryDirectory() as scratch:
            kind(**{part: getattr(pipeline, part) for part in (
                "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "scheduler")}).save_pretrained(f"{scratch}/configs")
            save_file({key: tensor.contiguous() for key, tensor in made.items()}, f"{scratch}/model.safetensors")
            more = dict(is_cosxl_edit=True) if name == "cosxl-edit" else {}
            loaded = kind.from_single_file(f"{scratch}/model.safetensors", config=f"{scratch}/configs", torch_dtype=torch.float32,
                                           local_files_only=True, **more)
        public = [{key: value for key, value in given.config.items() if key[0] != "_"} for given in (loaded.scheduler, scheduler)]
        assert public[0] == public[1], public
        assert loaded.unet.dtype == torch.float32 and torch.equal(loaded.unet.conv_in.weight, made[
            "model.diffusion_model.input_blocks.0.0.weight"].float())
        latents, picture = drawn(loaded, **options)
        print(name, "std", latents.std().item(), "most", latents.abs().max().item(), "picture", picture.mean().item(), picture.std().item())
        keep[f"{name}/latents"] = latents.contiguous()
        keep[f"{name}/picture"] = picture.contiguous()
        notes["markers"][name] = {key: dict(shape=list(tensor.shape), values=tensor.flatten().tolist()) for key, tensor in markers.items()}
    save_file(keep, f"{out}.safetensors")
    Path(f"{out}.json").write_text(json.dumps(notes, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
