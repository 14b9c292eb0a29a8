"""Makes small random UNets of every architecture, and what diffusers computes with them and with pictures.

    python make_architectures.py make  OUT     # OUT/NAME/: the UNet, reference.safetensors; OUT/image.png, OUT/mask.png
    python make_architectures.py count         # parameters of the published sizes, without weights

Run beside base-like, refiner-like and v-prediction: all but the UNet of NAME is that of base-like.
Everything in reference.safetensors is float32 arithmetic on the weights as stored.
"""
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import (DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, StableDiffusionXLImg2ImgPipeline,
                       StableDiffusionXLInpaintPipeline, StableDiffusionXLInstructPix2PixPipeline, StableDiffusionXLPipeline,
                       UNet2DConditionModel)
from make_pipelines import GUIDANCE, LONG, NEGATIVE, PROMPT, SEED, STEPS, load, randomise, tidy
from PIL import Image
from safetensors.torch import save_file
from torch import nn

HERE = Path(__file__).parent
SDXL = dict(
    sample_size=128, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), block_out_channels=(320, 640, 1280),
    attention_head_dim=(5, 10, 20), addition_embed_type="text_time", addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816, use_linear_projection=True, cross_attention_dim=2048,
    transformer_layers_per_block=(1, 2, 10))
PUBLISHED = {
    "sdxl-base": {}, "sdxl-inpainting": dict(in_channels=9), "sdxl-edit": dict(in_channels=8), "lcm-sdxl": dict(time_cond_proj_dim=256),
    "ssd-1b": dict(mid_block_type="UNetMidBlock2D", transformer_layers_per_block=[0, 2, 4],
                   reverse_transformer_layers_per_block=[[4, 4, 10], [2, 1, 1], 1]),
    "vega": dict(mid_block_type="UNetMidBlock2D", transformer_layers_per_block=(1, 1, 2)),
    "koala-700m": dict(mid_block_type=None, layers_per_block=1, transformer_layers_per_block=(1, 2, 5)),
    "koala-1b": dict(layers_per_block=1, transformer_layers_per_block=(1, 2, 6)),
    "sdxl-refiner": dict(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), block_out_channels=(384, 768, 1536, 1536),
        attention_head_dim=(6, 12, 24, 24), cross_attention_dim=1280, projection_class_embeddings_input_dim=2560,
        transformer_layers_per_block=4),
}
SMALL = dict(
    sample_size=8, layers_per_block=2, norm_num_groups=4, cross_attention_dim=40, addition_embed_type="text_time",
    down_block_types=SDXL["down_block_types"], up_block_types=SDXL["up_block_types"], block_out_channels=(4, 8, 12),
    attention_head_dim=(1, 2, 3), addition_time_embed_dim=8, projection_class_embeddings_input_dim=32 + 6 * 8,
    use_linear_projection=True, transformer_layers_per_block=(1, 1, 2))
# The depths in lists are all different, so that none can be taken for another.
UNETS = {
    "ssd-like": dict(mid_block_type="UNetMidBlock2D", transformer_layers_per_block=[0, [1, 2], [2, 1]],
                     reverse_transformer_layers_per_block=[[1, 2, 3], [2, 1, 1], 1]),
    "koala-like": dict(mid_block_type=None, layers_per_block=1, transformer_layers_per_block=(1, 1, 2)),
    "lcm-like": dict(time_cond_proj_dim=16),
    "inpainting-like": dict(in_channels=9),
    "edit-like": dict(in_channels=8),
}


def count():
    for name, changes in PUBLISHED.items():
        with torch.device("meta"):
            unet = UNet2DConditionModel(**{**SDXL, **changes})
        layers = sum(m.weight.numel() for m in unet.modules() if isinstance(m, (nn.Linear, nn.Conv2d)))
        print(f"{name}: {sum(p.numel() for p in unet.parameters()):,} parameters, {layers:,} of them in weights of Linear and Conv2d")


def drawn():
    """A picture with edges and slopes, and a mask whose greys lie on both sides of one half."""
    y, x = np.mgrid[:64, :64]
    picture = np.stack([4 * x, 255 - 2 * y - x, 3 * (x ^ y)], -1).astype(np.uint8)
    picture[12:30, 20:44] = (250, 30, 90)
    mask = np.where((x > 18) & (y > 10) & (y < 50), 255, 0).astype(np.uint8)
    mask[40:48], mask[48:56] = 127, 128
    return Image.fromarray(picture), Image.fromarray(mask)


def teach(unet, scheduler, states, pooled, ids, rounds=250):
    """As in make_pipelines.py, with random channels beside the noisy latents."""
    outer = [w for k, w in unet.named_parameters() if k.startswith(("conv_", f"up_blocks.{len(unet.up_blocks) - 1}."))]
    colours, best = torch.randn(len(states), 4, 1, 1), torch.optim.Adam(outer, 3e-3)
    beside, told = unet.config.in_channels - 4, unet.config.time_cond_proj_dim
    for _ in range(rounds):
        pick, t = torch.randint(len(states), (8,)), torch.randint(1000, (8,))
        clean = 0.5 * colours[pick] + 0.5 * nn.functional.interpolate(torch.randn(8, 4, 2, 2), size=8)
        noise, alpha = torch.randn(8, 4, 8, 8), scheduler.alphas_cumprod[t].view(8, 1, 1, 1)
        noisy = torch.cat([alpha ** 0.5 * clean + (1 - alpha) ** 0.5 * noise, torch.randn(8, beside, 8, 8)], 1)
        given = dict(text_embeds=pooled[pick], time_ids=ids.repeat(8, 1))
        guess = unet(noisy, t, states[pick], timestep_cond=torch.rand(8, told) * 2 - 1 if told else None, added_cond_kwargs=given).sample
        best.zero_grad()
        nn.functional.mse_loss(guess, noise).backward()
        best.step()


def parts_of(pipe):
    return {k: v for k, v in pipe.components.items() if k not in ("image_encoder", "feature_extractor")}


def generator():
    return torch.Generator().manual_seed(SEED)


def run(pipe, outputs=("latent", "pt"), guidance=GUIDANCE, **options):
    pipe.set_progress_bar_config(disable=True)
    return [pipe(PROMPT, guidance_scale=guidance, num_inference_steps=STEPS, output_type=output, generator=generator(), **options).images
            for output in outputs]


@torch.no_grad()
def of_unet(name, folder, picture, mask):
    base = load(HERE / "base-like")
    unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32)
    parts = parts_of(base) | dict(unet=unet)
    states, _, pooled, _ = base.encode_prompt(PROMPT, device="cpu")
    beside = torch.randn(1, unet.config.in_channels, 8, 8, generator=torch.Generator().manual_seed(SEED))
    told = unet.config.time_cond_proj_dim
    told = None if told is None else StableDiffusionXLPipeline.get_guidance_scale_embedding(None, torch.tensor(GUIDANCE - 1)[None], told)
    given = dict(text_embeds=pooled, time_ids=torch.tensor([[64.0, 64, 0, 0, 64, 64]]))
    keep = {"unet@500/output": unet(beside, 500.0, states, timestep_cond=told, added_cond_kwargs=given).sample}
    if told is not None:
        keep["timestep_cond"] = told

    def both(key, pipe, **options):
        keep[f"{key}final_latents"], keep[f"{key}image"] = run(pipe, **options)
    if name == "inpainting-like":
        pipe = StableDiffusionXLInpaintPipeline(**parts, add_watermarker=False)
        for strength in (0.9999, 1.0, 0.6):
            both(f"strength@{strength}/", pipe, image=picture, mask_image=mask, strength=strength)
        keep["noguidance/final_latents"], = run(pipe, ("latent",), image=picture, mask_image=mask, strength=1.0, guidance=1.0)
    elif name == "edit-like":
        for key, cosxl in (("", False), ("cosxl/", True)):
            pipe = StableDiffusionXLInstructPix2PixPipeline(**parts, is_cosxl_edit=cosxl, add_watermarker=False)
            both(key, pipe, image=picture, image_guidance_scale=1.5, height=64, width=64)
        # with is_cosxl_edit
        keep["noguidance/final_latents"], = run(pipe, ("latent",), image=picture, guidance=1.0, height=64, width=64)
    else:
        pipe = StableDiffusionXLPipeline(**parts, add_watermarker=False)
        both("", pipe, height=64, width=64)
        keep["noguidance/final_latents"], = run(pipe, ("latent",), guidance=1.0, height=64, width=64)
    return keep


@torch.no_grad()
def of_pictures(picture, mask):
    """The VAE's encoder, image to image, and inpainting with UNets that know nothing of masks."""
    keep = {}
    for name in ("base-like", "refiner-like", "v-prediction"):
        pipe = load(HERE / name)
        tensor = pipe.image_processor.preprocess(picture)
        moments = pipe.vae.encode(tensor).latent_dist
        keep |= {f"{name}/mean": moments.mean, f"{name}/std": moments.std}
        pipe = StableDiffusionXLImg2ImgPipeline(
            **parts_of(pipe), add_watermarker=False, requires_aesthetics_score=name == "refiner-like",
            force_zeros_for_empty_prompt=pipe.config.force_zeros_for_empty_prompt)
        given = pipe.scheduler.config
        for key, kind in (("euler", EulerDiscreteScheduler), ("ddim", DDIMScheduler), ("dpmpp-2m", DPMSolverMultistepScheduler)):
            pipe.scheduler = kind.from_config(given)
            for strength in (0.3, 0.75, 1.0):
                keep[f"{name}/{key}@{strength}/final_latents"], = run(pipe, ("latent",), image=picture, strength=strength)
        pipe.scheduler = EulerDiscreteScheduler.from_config(given)
        keep[f"{name}/euler@0.75/image"], = run(pipe, ("pt",), image=picture, strength=0.75)
        if name == "base-like":
            pipe = StableDiffusionXLInpaintPipeline(**parts_of(pipe), add_watermarker=False)
            for strength in (0.7, 1.0):
                keep[f"{name}/mask@{strength}/final_latents"], = run(pipe, ("latent",), image=picture, mask_image=mask, strength=strength)
        pipe = load(HERE / name)
        if name == "base-like":
            keep[f"{name}/clip_skip@1/prompt_embeds"] = pipe.encode_prompt(PROMPT, device="cpu", clip_skip=1)[0]
    return keep


def save(keep, file):
    assert all(v.isfinite().all() for v in keep.values())
    save_file({k: v.contiguous().clone() for k, v in keep.items()}, file)
    for key, value in keep.items():
        print(f"{file.parent.name}/{key}: {list(value.shape)} std {value.std():.3f} max {value.abs().max():.2f}")


def make(out):
    out = Path(out)
    torch.set_num_threads(1)
    out.mkdir(exist_ok=True)
    picture, mask = drawn()
    picture.save(out / "image.png")
    mask.save(out / "mask.png")
    base = load(HERE / "base-like")
    with torch.no_grad():
        encoded = [base.encode_prompt(p, device="cpu") for p in (PROMPT, NEGATIVE, LONG)]
    states, pooled = (torch.cat([e[i] for e in encoded for i in pair]) for pair in ((0, 1), (2, 3)))
    for number, (name, changes) in enumerate(UNETS.items()):
        folder = out / name
        shutil.rmtree(folder, ignore_errors=True)
        torch.manual_seed(10 + number)
        unet = randomise(UNet2DConditionModel(**{**SMALL, **changes}))
        teach(unet, base.scheduler, states, pooled, torch.tensor([[64.0, 64, 0, 0, 64, 64]]))
        unet.half().save_pretrained(folder / "unet")
        tidy(folder)
        save(of_unet(name, folder, picture, mask), folder / "reference.safetensors")
    save(of_pictures(picture, mask), out / "pictures.safetensors")
    for file in out.rglob("*.*"):
        file.chmod(0o644)


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
