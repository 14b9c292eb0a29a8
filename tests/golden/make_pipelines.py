"""Makes the small random SDXL pipelines of the tests, and computes references with diffusers.

    python make_pipelines.py make  TOKENIZER OUT [NAME...]   # OUT/NAME/: diffusers folder, reference.safetensors, reference.json
    python make_pipelines.py check OUT [NAME...]             # the effect of small changes of noise and of single weights

TOKENIZER is a folder with a CLIP vocab.json and merges.txt; only its first merges are kept.
All values in reference.safetensors are computed in float32 from the stored weights.
"""
import json
import shutil
import sys
from pathlib import Path

import torch
from diffusers import (AutoencoderKL, DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler,
                       StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline, UNet2DConditionModel)
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

STEPS, GUIDANCE, SEED, MERGES = 10, 4.0, 231, 300
PROMPT, NEGATIVE = "a picture of a cat's face, 2 red apples & a dog!", "Blurry, LOW quality!!"
LONG = "the cat and the dog sat on a red mat, " * 12
TYPED_EOS = "a cat <|endoftext|> and a dog"
SCHEDULERS = {
    "euler": (EulerDiscreteScheduler, {}),
    "euler-karras": (EulerDiscreteScheduler, {"use_karras_sigmas": True}),
    "ddim": (DDIMScheduler, {}),
    "dpmpp-2m": (DPMSolverMultistepScheduler, {}),
    "dpmpp-2m-karras": (DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
}
# The config in the published SDXL folders. Euler ignores some of its keys, which other schedulers read.
PUBLISHED_SCHEDULER = dict(
    beta_end=0.012, beta_schedule="scaled_linear", beta_start=0.00085, clip_sample=False, interpolation_type="linear",
    num_train_timesteps=1000, prediction_type="epsilon", sample_max_value=1.0, set_alpha_to_one=False, skip_prk_steps=True,
    steps_offset=1, timestep_spacing="leading", trained_betas=None, use_karras_sigmas=False)
V_SCHEDULER = dict(
    beta_end=0.012, beta_schedule="scaled_linear", beta_start=0.00085, num_train_timesteps=1000,
    prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing")
RECIPES = {
    "base-like": dict(
        seed=1, scheduler=PUBLISHED_SCHEDULER, schedulers=(5, 20, 30),
        text=dict(hidden_size=16, num_attention_heads=2, num_hidden_layers=2, hidden_act="quick_gelu", eos_token_id=2),
        text_2=dict(hidden_size=24, num_attention_heads=3, num_hidden_layers=3, hidden_act="gelu", projection_dim=32, eos_token_id=2),
        unet=dict(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(8, 16, 24), attention_head_dim=(1, 2, 3), transformer_layers_per_block=(1, 1, 2),
            addition_time_embed_dim=8, projection_class_embeddings_input_dim=32 + 6 * 8, use_linear_projection=True),
        vae=dict(block_out_channels=(8, 8, 16, 16), norm_num_groups=4, scaling_factor=0.13025, force_upcast=True)),
    "refiner-like": dict(
        seed=2, scheduler=PUBLISHED_SCHEDULER, schedulers=(5,),
        text_2=dict(hidden_size=24, num_attention_heads=3, num_hidden_layers=3, hidden_act="gelu", projection_dim=24),
        unet=dict(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(8, 8, 16, 16), attention_head_dim=(1, 1, 2, 2), transformer_layers_per_block=2,
            addition_time_embed_dim=8, projection_class_embeddings_input_dim=24 + 5 * 8, use_linear_projection=True),
        vae=dict(block_out_channels=(8, 8, 16), norm_num_groups=4, scaling_factor=0.13025, force_upcast=True)),
    "v-prediction": dict(
        seed=3, scheduler=V_SCHEDULER, schedulers=(5, 20),
        text=dict(hidden_size=24, num_attention_heads=3, num_hidden_layers=3, hidden_act="quick_gelu"),
        text_2=dict(hidden_size=16, num_attention_heads=2, num_hidden_layers=2, hidden_act="gelu", projection_dim=32),
        unet=dict(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(8, 16, 16), attention_head_dim=2, transformer_layers_per_block=(1, 2, 1),
            addition_time_embed_dim=8, projection_class_embeddings_input_dim=32 + 6 * 8, use_linear_projection=False),
        vae=dict(block_out_channels=(4, 8, 8, 8), norm_num_groups=2, scaling_factor=0.5, force_upcast=False,
                 mid_block_add_attention=False, latents_mean=(-1.5, 0.75, 0.25, -0.5), latents_std=(1.5, 0.5, 1.25, 2.0))),
}


# ---------------------------------------------------------------- the pipelines


def write_tokenizer(source, folder, pad, only_json=False):
    """Cuts a CLIP tokenizer to its first merges. With `only_json`, the folder has only the files that transformers 5 saves."""
    merges = (source / "merges.txt").read_text().split("\n")[:1 + MERGES]
    symbols = sorted(json.loads((source / "vocab.json").read_text()).items(), key=lambda entry: entry[1])[:512]
    tokens = [s for s, _ in symbols] + [m.replace(" ", "") for m in merges[1:]] + ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}, ensure_ascii=False))
    (folder / "merges.txt").write_text("\n".join(merges) + "\n")
    # Special tokens are objects with "normalized": true in the published folders.
    special = {k: dict(content=t, lstrip=False, normalized=True, rstrip=False, single_word=False)
               for k, t in (("bos_token", "<|startoftext|>"), ("eos_token", "<|endoftext|>"), ("unk_token", "<|endoftext|>"))}
    special["pad_token"] = pad
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")
    config = dict(add_prefix_space=False, clean_up_tokenization_spaces=True, do_lower_case=True, errors="replace",
                  model_max_length=77, tokenizer_class="CLIPTokenizer")
    config |= {k: {"__type": "AddedToken", **v} if isinstance(v, dict) else v for k, v in special.items()}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    if only_json:
        tokenizer = CLIPTokenizer.from_pretrained(folder)
        shutil.rmtree(folder)
        tokenizer.save_pretrained(folder)
        config = json.loads((folder / "tokenizer_config.json").read_text())
        config = {k: v for k, v in config.items() if k not in ("is_local", "local_files_only")}
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


@torch.no_grad()
def randomise(model):
    """Sets all weights to values of order 1, so that a missing bias, norm or projection changes results visibly."""
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.weight.copy_(0.7 * torch.randn_like(module.weight))
        elif isinstance(module, (nn.Linear, nn.Conv2d)):
            module.weight.copy_(torch.randn_like(module.weight) / module.weight[0].numel() ** 0.5)
            if module.bias is not None:
                module.bias.copy_(0.2 * torch.randn_like(module.bias))
        elif isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
            module.weight.copy_(1 + 0.25 * torch.randn_like(module.weight))
            module.bias.copy_(0.25 * torch.randn_like(module.bias))
    return model.eval()


def teach(unet, scheduler, states, pooled, ids, rounds=250):
    """Trains the outer layers to remove noise for a moment. Sampling then ends at order 1 and does not amplify rounding errors."""
    outer = [w for k, w in unet.named_parameters() if k.startswith(("conv_", f"up_blocks.{len(unet.up_blocks) - 1}."))]
    colours, best = torch.randn(len(states), 4, 1, 1), torch.optim.Adam(outer, 3e-3)
    for _ in range(rounds):
        pick, t = torch.randint(len(states), (8,)), torch.randint(1000, (8,))
        clean = 0.5 * colours[pick] + 0.5 * nn.functional.interpolate(torch.randn(8, 4, 2, 2), size=8)
        noise, alpha = torch.randn(8, 4, 8, 8), scheduler.alphas_cumprod[t].view(8, 1, 1, 1)
        noisy = alpha ** 0.5 * clean + (1 - alpha) ** 0.5 * noise
        target = alpha ** 0.5 * noise - (1 - alpha) ** 0.5 * clean if scheduler.config.prediction_type == "v_prediction" else noise
        guess = unet(noisy, t, states[pick], added_cond_kwargs=dict(text_embeds=pooled[pick], time_ids=ids.repeat(8, 1))).sample
        best.zero_grad()
        nn.functional.mse_loss(guess, target).backward()
        best.step()


def text_config(entries):
    return CLIPTextConfig(**{
        "vocab_size": 514 + MERGES, "bos_token_id": 512 + MERGES, "eos_token_id": 513 + MERGES, "pad_token_id": 1,
        "intermediate_size": 4 * entries["hidden_size"], **entries})


def tidy(folder):
    for config in folder.rglob("config.json"):
        entries = json.loads(config.read_text())
        entries.pop("_name_or_path", None)
        config.write_text(json.dumps(entries, indent=2) + "\n")


def build(name, source, folder):
    recipe = RECIPES[name]
    torch.manual_seed(recipe["seed"])
    refiner, v = name == "refiner-like", name == "v-prediction"
    if not refiner:
        write_tokenizer(source, folder / "tokenizer", "<|endoftext|>")
    write_tokenizer(source, folder / "tokenizer_2", "!", only_json=v)
    parts = dict(text_encoder=None, tokenizer=None)
    if not refiner:
        parts["tokenizer"] = CLIPTokenizer.from_pretrained(folder / "tokenizer")
        parts["text_encoder"] = randomise(CLIPTextModel(text_config(recipe["text"])))
    parts["tokenizer_2"] = CLIPTokenizer.from_pretrained(folder / "tokenizer_2")
    parts["text_encoder_2"] = randomise(CLIPTextModelWithProjection(text_config(recipe["text_2"])))
    width = sum(recipe[t]["hidden_size"] for t in ("text", "text_2") if t in recipe)
    parts["unet"] = randomise(UNet2DConditionModel(
        sample_size=8, layers_per_block=2, norm_num_groups=4, cross_attention_dim=width, addition_embed_type="text_time", **recipe["unet"]))
    levels = len(recipe["vae"]["block_out_channels"])
    parts["vae"] = randomise(AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1, latent_channels=4, sample_size=64, **recipe["vae"]))
    parts["vae"].decoder.conv_out.weight.data.mul_(0.6)  # most of the picture stays between 0 and 1
    parts["scheduler"] = EulerDiscreteScheduler.from_config(recipe["scheduler"])
    if refiner:
        pipe = StableDiffusionXLImg2ImgPipeline(
            **parts, force_zeros_for_empty_prompt=False, requires_aesthetics_score=True, add_watermarker=False)
    else:
        pipe = StableDiffusionXLPipeline(**parts, force_zeros_for_empty_prompt=True, add_watermarker=False)
    with torch.no_grad():
        encoded = [pipe.encode_prompt(p, device="cpu") for p in (PROMPT, NEGATIVE, LONG)]
    teach(pipe.unet, pipe.scheduler, torch.cat([e[i] for e in encoded for i in (0, 1)]),
          torch.cat([e[i] for e in encoded for i in (2, 3)]), torch.tensor([time_ids(name)]))
    for part in ("text_encoder", "text_encoder_2", "unet", "vae"):
        if parts[part] is not None:
            parts[part].half()
    kept = {t: {f.name: f.read_bytes() for f in (folder / t).iterdir()} for t in ("tokenizer", "tokenizer_2") if parts[t]}
    pipe.save_pretrained(folder)
    for t, files in kept.items():  # transformers 5 would save tokenizer.json only
        shutil.rmtree(folder / t)
        (folder / t).mkdir()
        for file, content in files.items():
            (folder / t / file).write_bytes(content)
    scheduler = folder / "scheduler/scheduler_config.json"
    scheduler.write_text(json.dumps({"_class_name": "EulerDiscreteScheduler", "_diffusers_version": "0.42.1", **recipe["scheduler"]}, indent=2) + "\n")
    return parts


def prefix(file, extra=None):
    """Gives tensors the names of the published folders. transformers 5 drops this prefix when it saves a CLIPTextModel."""
    weights = {"text_model." + k.removeprefix("text_model."): w for k, w in load_file(file).items()}
    save_file(weights | (extra or {}), file, metadata={"format": "pt"})


def make(source, out, *names):
    source, out = Path(source), Path(out)
    torch.set_num_threads(1)
    for name in names or RECIPES:
        folder = out / name
        shutil.rmtree(folder, ignore_errors=True)
        parts = build(name, source, folder)
        if name == "base-like":  # older published folders also hold this buffer
            prefix(folder / "text_encoder/model.safetensors", {"text_model.embeddings.position_ids": torch.arange(77)[None]})
        if name == "v-prediction":
            for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
                shutil.rmtree(folder / part)
            parts["unet"].bfloat16().save_pretrained(folder / "unet", max_shard_size="150KB")
            parts["vae"].float().save_pretrained(folder / "vae")
            parts["text_encoder"].save_pretrained(folder / "text_encoder", variant="fp16")
            parts["text_encoder_2"].float().save_pretrained(folder / "text_encoder_2")
        tidy(folder)
        reference(name, folder)
        for file in folder.rglob("*.*"):
            file.chmod(0o644)


# ---------------------------------------------------------------- the references


def load(folder):
    """Loads the pipeline in float32, part by part because the v-prediction folder mixes file variants."""
    pipe_class = StableDiffusionXLImg2ImgPipeline if folder.name == "refiner-like" else StableDiffusionXLPipeline
    given = {}
    if folder.name == "v-prediction":
        given["text_encoder"] = CLIPTextModel.from_pretrained(folder / "text_encoder", variant="fp16", dtype=torch.float32)
    pipe = pipe_class.from_pretrained(folder, torch_dtype=torch.float32, add_watermarker=False, **given)
    pipe.set_progress_bar_config(disable=True)
    for part in (pipe.text_encoder, pipe.text_encoder_2, pipe.unet, pipe.vae):
        assert part is None or part.dtype == torch.float32
    return pipe


def time_ids(name, height=64, width=64, score=6.0):
    return [float(height), width, 0, 0, *([score] if name == "refiner-like" else [height, width])]


def tokens(pipe, prompt, front=""):
    named = (("tokenizer", pipe.tokenizer), ("tokenizer_2", pipe.tokenizer_2))
    return {f"{front}{n}.input_ids": t(prompt, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
            for n, t in named if t is not None}


def start_noise(pipe, height, width):
    factor = pipe.vae_scale_factor
    return torch.randn(1, 4, height // factor, width // factor, generator=torch.Generator().manual_seed(SEED))


def sample(pipe, noise, output="latent", negative=None, guidance=GUIDANCE, steps=STEPS):
    run = dict(negative_prompt=negative, guidance_scale=guidance, num_inference_steps=steps, output_type=output)
    if isinstance(pipe, StableDiffusionXLImg2ImgPipeline):
        # A start of 1e-6 keeps every timestep and adds no noise, so sampling starts from the given latents.
        pipe.scheduler.set_timesteps(steps)
        return pipe(PROMPT, image=noise * pipe.scheduler.init_noise_sigma, denoising_start=1e-6,
                    aesthetic_score=6.0, negative_aesthetic_score=2.5, **run).images
    height, width = (pipe.vae_scale_factor * s for s in noise.shape[-2:])
    return pipe(PROMPT, latents=noise.clone(), height=height, width=width, **run).images


def watched(unet, noise, t, states, pooled, ids, front, residuals=True):
    """Calls the UNet once, and returns its output and the outputs of all stages."""
    keep, hooks = {}, []
    blocks = {f"down_blocks.{i}": b for i, b in enumerate(unet.down_blocks)} | {"mid_block": unet.mid_block}
    blocks |= {f"up_blocks.{i}": b for i, b in enumerate(unet.up_blocks)}

    def watch(name):
        def hook(module, args, result):
            hidden, rest = result if isinstance(result, tuple) else (result, ())
            keep[f"{front}/{name}/hidden_states"] = hidden
            if residuals:
                keep.update({f"{front}/{name}/residual.{k}": r for k, r in enumerate(rest)})
        return hook
    hooks = [b.register_forward_hook(watch(n)) for n, b in blocks.items()]
    hooks.append(unet.conv_in.register_forward_hook(lambda m, a, r: keep.__setitem__(f"{front}/conv_in", r)))
    hooks.append(unet.mid_block.register_forward_pre_hook(lambda m, a: keep.__setitem__(f"{front}/temb", a[1])))
    keep[f"{front}/output"] = unet(noise, t, states, added_cond_kwargs=dict(text_embeds=pooled, time_ids=ids)).sample
    for h in hooks:
        h.remove()
    return keep


def plain(config):
    named = {k: v for k, v in sorted(dict(config).items()) if not k.startswith("_") or k == "_class_name"}
    return {k: str(v) if v == -float("inf") else v for k, v in named.items()}  # JSON has no infinity


@torch.no_grad()
def reference(name, folder):
    pipe, refiner = load(folder), name == "refiner-like"
    keep = tokens(pipe, PROMPT)
    embeds = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    encoded = dict(zip(embeds, pipe.encode_prompt(PROMPT, device="cpu")))
    keep |= encoded
    for key, negative in (("negative", NEGATIVE), ("empty", "")):
        e = dict(zip(embeds, pipe.encode_prompt(PROMPT, device="cpu", negative_prompt=negative)))
        keep |= {f"{key}/{k}": e[k] for k in embeds if k.startswith("negative")} | tokens(pipe, negative, f"{key}/")
    for key, prompt in (("typed_eos", TYPED_EOS), ("long", LONG)):
        e = dict(zip(embeds, pipe.encode_prompt(prompt, device="cpu", do_classifier_free_guidance=False)))
        keep |= {f"{key}/{k}": e[k] for k in ("prompt_embeds", "pooled_prompt_embeds")} | tokens(pipe, prompt, f"{key}/")
    states, pooled = encoded["prompt_embeds"], encoded["pooled_prompt_embeds"]

    for front, (height, width) in (("", (64, 64)), ("odd/", (72, 104))):
        noise, ids = start_noise(pipe, height, width), torch.tensor([time_ids(name, height, width)])
        keep |= {f"{front}noise": noise, f"{front}time_ids": ids}
        if refiner:
            keep[f"{front}negative_time_ids"] = torch.tensor([time_ids(name, height, width, 2.5)])
        for t in (1, 500, 967):
            seen = watched(pipe.unet, noise, float(t), states, pooled, ids, f"{front}unet@{t}", residuals=not front)
            keep |= seen if t == 500 else {k: v for k, v in seen.items() if k.endswith("/output")}
        keep[f"{front}final_latents"] = sample(pipe, noise)
        keep[f"{front}image"] = sample(pipe, noise, "pt")
    noise = keep["noise"]
    for key, options in (("negative", dict(negative=NEGATIVE)), ("empty", dict(negative="")), ("noguidance", dict(guidance=1.0))):
        keep[f"{key}/final_latents"] = sample(pipe, noise, **options)

    pipe.scheduler.set_timesteps(STEPS)
    keep["scheduler.timesteps"], keep["scheduler.sigmas"] = pipe.scheduler.timesteps.float(), pipe.scheduler.sigmas
    start, configs = {"default": float(pipe.scheduler.init_noise_sigma)}, {"default": plain(pipe.scheduler.config)}
    given = pipe.scheduler.config
    for scheduler, (kind, options) in SCHEDULERS.items():
        for steps in RECIPES[name]["schedulers"]:
            key = f"{scheduler}@{steps}"
            pipe.scheduler = kind.from_config(given, **options)
            keep[f"scheduler/{key}/final_latents"] = sample(pipe, noise, steps=steps)
            keep[f"scheduler/{key}/timesteps"] = pipe.scheduler.timesteps.float()
            if hasattr(pipe.scheduler, "sigmas"):
                keep[f"scheduler/{key}/sigmas"] = pipe.scheduler.sigmas
            start[key] = float(pipe.scheduler.init_noise_sigma)
        configs[scheduler] = plain(pipe.scheduler.config)

    assert all(v.isfinite().all() for v in keep.values())
    save_file({k: v.contiguous().clone() for k, v in keep.items()}, folder / "reference.safetensors")
    (folder / "reference.json").write_text(json.dumps({
        "prompt": PROMPT, "negative_prompt": None, "negative/prompt": NEGATIVE, "empty/prompt": "",
        "typed_eos/prompt": TYPED_EOS, "long/prompt": LONG,
        "seed": SEED, "weights_seed": RECIPES[name]["seed"], "num_inference_steps": STEPS, "guidance_scale": GUIDANCE,
        "height": 64, "width": 64, "odd/height": 72, "odd/width": 104,
        **({"aesthetic_score": 6.0, "negative_aesthetic_score": 2.5} if refiner else {}),
        "dtype": "float32 arithmetic on the stored weights",
        "made_with": "diffusers 0.42.1, transformers 5.23.0, torch 2.11.0, CPU, one thread",
        "keys": {
            "noise": "torch.randn(1, 4, height / F, width / F, generator=torch.Generator().manual_seed(seed)); sampling starts from noise * init_noise_sigma; F = 2 ** (levels of the VAE - 1)",
            "TOKENIZER.input_ids": "token ids of the prompt, padded and cut to 77",
            "prompt_embeds, pooled_prompt_embeds": "encode_prompt(prompt)",
            "negative_prompt_embeds, negative_pooled_prompt_embeds": "for negative_prompt None: " + (
                "the encoded empty text, because force_zeros_for_empty_prompt is false" if refiner else "zeros, because force_zeros_for_empty_prompt is true"),
            "time_ids": "height, width, 0, 0, " + ("aesthetic score; negative_time_ids holds those of the negative half" if refiner else "height, width; the same for both halves"),
            "unet@T/output": "UNet2DConditionModel(noise, T, prompt_embeds, text_embeds=pooled_prompt_embeds, time_ids): one sample, no guidance",
            "unet@500/STAGE": "what that block returned in the call at T = 500; residual.k is the k-th of its res samples; temb is the summed embedding before its activation",
            "final_latents": "after the last step, before the VAE; guidance_scale, negative_prompt None, the folder's scheduler",
            "image": "the VAE's picture in [0, 1] for the same run, output_type=\"pt\"",
            "negative/": "the same run with the negative prompt of negative/prompt, encoded",
            "empty/": "the same run with negative_prompt \"\", which is encoded and is never zeros",
            "noguidance/": "the same run with guidance_scale 1: prompt_embeds only",
            "typed_eos/, long/": "encode_prompt of a prompt that has the end token in its middle, and of one with more than 77 tokens",
            "odd/": "the same at odd/height and odd/width, where halving the latents leaves odd sizes",
            "scheduler.timesteps, scheduler.sigmas": "of the folder's scheduler at num_inference_steps",
            "scheduler/NAME@STEPS/": "CLASS.from_config(folder's scheduler config, OPTIONS), see schedulers; final_latents of the run with that many steps",
        },
        "schedulers": {k: {"class": c.__name__, "options": o, "config": configs[k]} for k, (c, o) in SCHEDULERS.items()},
        "scheduler_config": configs["default"], "init_noise_sigma": start,
        "tensors": {k: f"{str(v.dtype).removeprefix('torch.')} {list(v.shape)}" for k, v in keep.items()},
    }, indent=1, allow_nan=False) + "\n")


# ---------------------------------------------------------------- checks of the bounds


@torch.no_grad()
def check(out, *names):
    torch.set_num_threads(1)
    for name in names or RECIPES:
        folder = Path(out) / name
        pipe, r = load(folder), load_file(folder / "reference.safetensors")
        for k in ("prompt_embeds", "pooled_prompt_embeds", "unet@1/output", "unet@500/output", "unet@967/output", "final_latents",
                  "negative/final_latents", "noguidance/final_latents", "odd/final_latents", "image", "odd/image"):
            print(f"{name} {k}: mean {r[k].mean():.3f} std {r[k].std():.3f} max {r[k].abs().max():.2f}")
        print(f"{name} picture cut off: {((r['image'] == 0) | (r['image'] == 1)).float().mean():.2f}")

        def far(a, b):
            return float((a - b).norm() / b.norm())
        shaken = {f: r[f + "noise"] * (1 + 1e-6 * torch.randn(r[f + "noise"].shape, generator=torch.Generator().manual_seed(7))) for f in ("", "odd/")}
        print(f"{name} final latents after noise * (1 + 1e-6 randn): {far(sample(pipe, shaken['']), r['final_latents']):.1e},"
              f" odd {far(sample(pipe, shaken['odd/']), r['odd/final_latents']):.1e},"
              f" image {far(sample(pipe, shaken[''], 'pt'), r['image']):.1e}")
        given = pipe.scheduler.config
        for scheduler, (kind, options) in SCHEDULERS.items():
            for steps in RECIPES[name]["schedulers"]:
                pipe.scheduler = kind.from_config(given, **options)
                b = r[f"scheduler/{scheduler}@{steps}/final_latents"]
                print(f"  {scheduler}@{steps}: std {b.std():.2f}, {far(sample(pipe, shaken[''], steps=steps), b):.1e}")
        ids = pipe.tokenizer_2(PROMPT, padding="max_length", return_tensors="pt").input_ids
        z = r["final_latents"][:1]
        runs = {
            "unet": lambda: list(watched(pipe.unet, r["noise"], 500.0, r["prompt_embeds"], r["pooled_prompt_embeds"], r["time_ids"], "").values()),
            "vae": lambda: [pipe.vae.decode(z / pipe.vae.config.scaling_factor).sample],
            "text_encoder_2": lambda: [pipe.text_encoder_2(ids).text_embeds],
            "text_encoder": lambda: [pipe.text_encoder(ids, output_hidden_states=True).hidden_states[-2]]}
        for part, run in runs.items():
            if getattr(pipe, part) is None:
                continue
            base, weak = run(), []
            for key, w in getattr(pipe, part).named_parameters():
                old = w.clone()
                w.copy_(torch.ones_like(w) if "norm" in key and key.endswith("weight") else torch.zeros_like(w))
                now = run()
                weak.append((max(map(far, now, base)), far(now[-1], base[-1]), key))
                w.copy_(old)
            weak = sorted(w for w in weak if part != "vae" or not w[2].startswith(("encoder", "quant_conv")))
            print(f"{name} {part}: least change (of any stage, of the last) when one of {len(weak)} tensors is made plain: "
                  + ", ".join(f"{k} {d:.1e} {e:.1e}" for d, e, k in weak[:4]) + f"; of the last {min(w[1] for w in weak):.1e}")


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
