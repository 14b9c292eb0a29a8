"""Draws pictures with swift_pipeline.py over the packages of `bundle`, and compares them with those of `generate` and of diffusers.

    python check_swift.py SDXL-SQUEEZE coreml/swift                    # swift.json and pictures in the folder
    python check_swift.py --operations coreml/operations-noise.json    # the operations that make noise, by MIL's builder

1. pictures: both have the same first noise, which `generate` draws as torch does from a seed. Each picture must be within 50 dB of
   `generate`'s. The refiner, and models with another noise schedule than Apple's, are compared with diffusers' networks and DPM++ in
   a loop of this script.
2. noise: where a UNet predicts the velocity or the picture, the package's output must be within 1e-4 of the noise that
   `DPMSolverMultistepScheduler.convert_model_output` makes of the prediction of diffusers' UNet.
3. these packages and that of a refiner: as check_coreml.py, the loader, all tensors bit for bit, and for the refiner the output.
"""

import hashlib
import json
import pathlib
import shutil
import subprocess
import sys
import tempfile

import numpy as np
import torch
from PIL import Image
from safetensors.numpy import load_file
from check_coreml import Stored, forward, loader, values
from check_coreml_parts import rounded, text_network, vae_network
from mil_torch import Package, evaluate
from noise_of_predictions import noise_of, own_timesteps
from swift_pipeline import Pipeline

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
EMOJI = ROOT / "models/emoji-sdxl"
BASE = HERE / "base-like"
PROMPT = "an emoji of a red apple"
LIMIT = 50.0


def psnr(a, b):
    error = ((a.astype(np.float64) - b.astype(np.float64)) ** 2).mean()
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


def changed(folder, source, **entries):
    """A copy of a pipeline with other entries in its sampler's config."""
    model = folder / f"model-{len(list(folder.iterdir()))}"
    shutil.copytree(source, model)
    path = model / "scheduler/scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))
    return model


def case(squeeze, folder, source, config, keys={}, bundle=(), generate=(), by_diffusers=False, refiner=None):
    at = folder / f"case-{len(list(folder.iterdir()))}"
    at.mkdir()
    model = changed(folder, source, **keys) if keys else source
    quiet = {"check": True, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    bundle = [*bundle, *(["--refiner", refiner] if refiner else [])]
    subprocess.run([squeeze, "bundle", "--model", model, "--out", at / "Resources", *bundle], **quiet)
    size = json.loads((model / "unet/config.json").read_text())["sample_size"]
    vae = json.loads((model / "vae/config.json").read_text())
    pixels = size * 2 ** (len(vae["block_out_channels"]) - 1)
    config = {"prompt": PROMPT, "negative": "", "guidance": 7.5, "seed": 231, "original_size": pixels, "target_size": pixels} | config
    config["scale"] = vae["scaling_factor"]
    noise = torch.randn(1, vae["latent_channels"], size, size, generator=torch.Generator().manual_seed(config["seed"])).numpy()
    if by_diffusers or refiner:
        wanted, final = reference(model, config, noise, refiner)
    else:
        sampler = {"pndm": "plms", "dpmpp": "dpmpp-2m"}[config["scheduler"]]
        spacing = config.get("spacing", "leading" if config["scheduler"] == "pndm" else "linspace")
        original, target = [config["original_size"]] * 2, [config["target_size"]] * 2
        flags = ["--prompt", config["prompt"], "--negative-prompt", config["negative"], "--guidance", config["guidance"]]
        flags += ["--steps", config["steps"], "--seed", config["seed"], "--scheduler", sampler, "--timestep-spacing", spacing]
        flags += ["--original-size", *original, "--target-size", *target, "-o", at / "x.png", "--latents-out", at / "x.safetensors", *generate]
        subprocess.run([squeeze, "generate", "--model", model, *map(str, flags)], **quiet)
        wanted, final = np.asarray(Image.open(at / "x.png").convert("RGB")), load_file(at / "x.safetensors")["latents"]
    picture, denoised, latents = Pipeline(at / "Resources").generate(config, noise)
    error = lambda made: float(f"{np.linalg.norm(made - final) / np.linalg.norm(final):.2g}")
    found = {"compared_with": "diffusers" if by_diffusers or refiner else "generate", "psnr": min(round(psnr(picture, wanted), 2), 999.0)}
    found |= {"equal_bytes": float(f"{(picture == wanted).mean():.4g}"), "latents_decoded": error(denoised), "latents_stepped": error(latents)}
    found |= {"deviation_of_the_picture": round(float(picture.std()), 1), "sha256": hashlib.sha256(picture.tobytes()).hexdigest()}
    return {"model": str(source.relative_to(ROOT)), "keys": keys, **config}, found, picture


def operations(out):
    """The parameters of the operations with which a program makes noise of a prediction, as MIL's own builder and coremltools write them."""
    import coremltools as ct
    from check_coreml import patterns
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.mil import types

    table = np.linspace(0.1, 0.9, 1000, dtype=np.float32)

    @mb.program(input_specs=[mb.TensorSpec((2, 4, 8, 8), types.fp16), mb.TensorSpec((2,), types.fp16)], opset_version=ct.target.iOS18)
    def program(sample, timestep):
        positions = mb.cast(x=timestep, dtype="int32")
        own = mb.gather(x=table, indices=positions, axis=0, batch_dims=0, validate_indices=False)
        own = mb.mul(x=mb.expand_dims(x=own, axes=[1]), y=np.float32([[1.5, 2.5]]))
        factors = mb.gather(x=1 - table, indices=positions, axis=0, batch_dims=0, validate_indices=False)
        factors = mb.reshape(x=factors, shape=[2, 1, 1, 1])
        latents = mb.mul(x=mb.cast(x=sample, dtype="fp32"), y=factors)
        predicted = mb.mul(x=mb.cast(x=mb.silu(x=sample), dtype="fp32"), y=factors)
        return mb.add(x=predicted, y=latents, name="made"), mb.cast(x=own, dtype="fp16")

    passes = ct.PassPipeline.DEFAULT
    # The pass stores positions in 16 bits where a table is short.
    passes.remove_passes({"common::add_int16_cast"})
    model = ct.convert(program, minimum_deployment_target=ct.target.iOS18, compute_precision=ct.precision.FLOAT32, pass_pipeline=passes, skip_model_load=True)
    with tempfile.TemporaryDirectory() as folder:
        package = pathlib.Path(folder) / "x.mlpackage"
        model.save(str(package))
        rows = {kind: sorted(" ".join(map(str, row)).strip() for row in found) for kind, found in patterns(package).items()}
    pathlib.Path(out).write_text(json.dumps(rows, indent=1, sort_keys=True) + "\n")


def unet_network(model):
    from diffusers import UNet2DConditionModel

    return rounded(UNet2DConditionModel.from_pretrained(model / "unet", torch_dtype=torch.float32))


def structure(squeeze, package, model):
    """The checks of a UNet's package that need no evaluation."""
    subprocess.run([squeeze, "verify", package], check=True, stdout=subprocess.DEVNULL)
    program, found = loader(package)
    return found | values(program, Stored(model))


def noises(squeeze, folder, model, layout):
    """The checks of a package, and the relative error of its noise at some timesteps."""
    at = folder / f"case-{len(list(folder.iterdir()))}"
    at.mkdir()
    flags = ["--to", "coreml", "--io", "apple", "--layout", layout]
    subprocess.run([squeeze, "export", model, *flags, "--out", at / "x.mlpackage"], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    package, unet = Package(at / "x.mlpackage"), unet_network(model)
    own, euler = own_timesteps(model)
    torch.manual_seed(5)
    given = {name: torch.randn(shape).half().float() for name, (_, shape) in package.inputs.items()}
    given["time_ids"] = torch.tensor([[1024.0, 1024, 0, 0, 1024, 1024]] * 2)
    states = given["encoder_hidden_states"].squeeze(2).mT
    added = {"text_embeds": given["text_embeds"], "time_ids": given["time_ids"]}
    found = {}
    for timestep in (999, 951, 741, 500, 21, 1):
        made = evaluate(package, given | {"timestep": torch.full((2,), float(timestep))})["noise_pred"]
        with torch.no_grad():
            prediction = unet(given["sample"], torch.tensor(own[timestep], dtype=torch.float32), states, added_cond_kwargs=added).sample
        wanted = noise_of(euler, prediction, given["sample"], timestep)
        found[timestep] = float(f"{float((made - wanted).norm() / wanted.norm()):.2g}")
    assert max(found.values()) < 1e-4, found
    return structure(squeeze, at / "x.mlpackage", model) | {"relative_error_at": found}


def refiners(squeeze, folder, refiner, layout):
    """The checks of the package of a refiner in a bundle."""
    at = folder / f"case-{len(list(folder.iterdir()))}"
    command = [squeeze, "bundle", "--model", BASE, "--refiner", refiner, "--layout", layout, "--out", at]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    package = at / "UnetRefiner.mlpackage"
    return structure(squeeze, package, refiner) | forward(Package(package), Stored(refiner))


def reference(model, config, noise, refiner=None):
    """The picture by diffusers' and transformers' networks and diffusers' DPM++ or PLMS of noise, on Apple's schedule."""
    from diffusers import DPMSolverMultistepScheduler, PNDMScheduler
    from transformers import CLIPTokenizer

    def states(parts):
        rows, pooled = [], None
        for part in parts:
            tokenizer = CLIPTokenizer.from_pretrained(model / part.replace("text_encoder", "tokenizer"))
            texts = [config["negative"], config["prompt"]]
            ids = tokenizer(texts, padding="max_length", truncation=True, max_length=77, return_tensors="pt").input_ids
            with torch.no_grad():
                made = text_network(model, part)(ids, output_hidden_states=True)
            rows.append(made.hidden_states[-2])
            pooled = getattr(made, "text_embeds", None)
        return torch.cat(rows, -1), pooled

    size = [float(config["original_size"])] * 2
    target = [float(config["target_size"])] * 2
    own, euler = own_timesteps(model)
    base = (unet_network(model), *states(["text_encoder", "text_encoder_2"]), torch.tensor([[*size, 0, 0, *target]] * 2), own)
    last = None
    if refiner:
        scores = torch.tensor([[*size, 0, 0, 2.5], [*size, 0, 0, 6.0]])
        last = (unet_network(refiner), *states(["text_encoder_2"]), scores, own_timesteps(refiner)[0])
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    sampler = DPMSolverMultistepScheduler(**betas)
    if config["scheduler"] == "pndm":
        sampler = PNDMScheduler(**betas, skip_prk_steps=True, set_alpha_to_one=True, steps_offset=1)
    sampler.set_timesteps(config["steps"])
    latents = torch.from_numpy(noise)
    for step, timestep in enumerate(sampler.timesteps):
        unet, text, pooled, ids, own = last if last and step >= int(0.8 * config["steps"]) else base
        added = {"text_embeds": pooled, "time_ids": ids}
        with torch.no_grad():
            told = torch.tensor(own[int(timestep)], dtype=torch.float32)
            negative, positive = unet(torch.cat([latents] * 2), told, text, added_cond_kwargs=added).sample.chunk(2)
        guided = noise_of(euler, negative + config["guidance"] * (positive - negative), latents, int(timestep))
        latents = sampler.step(guided, timestep, latents).prev_sample
    with torch.no_grad():
        picture = vae_network(model).decode(latents / config["scale"]).sample
    return np.rint((picture[0].permute(1, 2, 0) / 2 + 0.5).clamp(0, 1).numpy() * 255).astype(np.uint8), latents.numpy()


def small_refiner(folder):
    """The small refiner with the text encoder, the tokenizer and the VAE of the small base. Its UNet is told eight numbers more of pooled text."""
    from safetensors.torch import load_file, save_file

    model = folder / "refiner"
    shutil.copytree(HERE / "refiner-like", model)
    for part in ("text_encoder_2", "tokenizer_2", "vae"):
        shutil.rmtree(model / part)
        shutil.copytree(BASE / part, model / part)
    path = model / "unet/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"projection_class_embeddings_input_dim": 72}))
    path = model / "unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    weight = tensors["add_embedding.linear_1.weight"]
    tensors["add_embedding.linear_1.weight"] = torch.cat([weight[:, :8], weight], 1)
    save_file(tensors, path)
    return model


def main(squeeze, out):
    squeeze, out = pathlib.Path(squeeze).resolve(), pathlib.Path(out)
    out.mkdir(exist_ok=True)
    rows, noise_rows, refiner_rows = {}, {}, {}
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)

        def check(name, source, config, keys={}, limit=LIMIT, kept=None, **flags):
            settings, found, picture = case(squeeze, folder, source, config, keys, **flags)
            if kept:
                found["picture"] = kept
                Image.fromarray(picture).save(out / kept, optimize=True)
            rows[name] = {"settings": settings, **found}
            print(name, found, flush=True)
            assert limit is None or found["psnr"] >= limit, f"{name}: {found['psnr']} dB"

        # Swift decodes the latents of the last step without their noise, to which PLMS in diffusers goes with `set_alpha_to_one`.
        dpm, pndm = {"scheduler": "dpmpp", "steps": 15}, {"scheduler": "pndm", "steps": 12}
        velocity = {"prediction_type": "v_prediction", "set_alpha_to_one": True}
        # PLMS in diffusers combines velocities, and Swift the noise that is made of them.
        check("v-prediction, PNDM", BASE, pndm, velocity, by_diffusers=True)
        check("v-prediction, DPM++", BASE, dpm, velocity, kept="velocity-dpmpp.png")
        check("v-prediction, DPM++, split-einsum", BASE, dpm, velocity, bundle=["--layout", "split-einsum"])
        check("sample, DPM++", BASE, dpm, {"prediction_type": "sample"})
        zero_snr = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
        linear = {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}
        check("v-prediction with zero terminal SNR, DPM++", BASE, dpm, zero_snr, by_diffusers=True)
        check("betas of another schedule, DPM++", BASE, dpm, linear, by_diffusers=True)
        refiner = small_refiner(folder)
        check("base and refiner, DPM++", BASE, dpm, refiner=refiner)

        check("PNDM", EMOJI, pndm, {"set_alpha_to_one": True}, kept="pndm.png")
        check("DPM++, sizes of 1024", EMOJI, dpm | {"original_size": 1024, "target_size": 1024}, kept="sizes-of-1024.png")
        # Words alone: Swift's tokenizer reads a comma as the end of its word.
        check("DPM++, leading, a negative prompt", EMOJI, dpm | {"spacing": "leading", "negative": "blurry dark", "guidance": 5.0})
        check("DPM++, leading, a negative prompt with a comma", EMOJI, dpm | {"spacing": "leading", "negative": "blurry, dark", "guidance": 5.0}, limit=None)
        compressed = folder / "compressed"
        command = [squeeze, "compress", "--config", ROOT / "configs/emoji/tutorial-4bit-gs16.yaml", "--model", EMOJI, "--out", compressed]
        subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        unet = ["--unet", compressed / "unet.squeezed.safetensors"]
        check("DPM++, 4 bits, split-einsum", EMOJI, dpm, bundle=[*unet, "--layout", "split-einsum"], generate=unet)
        # Without `set_alpha_to_one`, PLMS leaves in the last latents the noise that Swift does not decode.
        check("PNDM, a model whose last step leaves some noise", EMOJI, pndm, limit=None)

        for name, keys in {
            "v-prediction": {"prediction_type": "v_prediction"},
            "sample": {"prediction_type": "sample"},
            "v-prediction with zero terminal SNR": zero_snr,
            "betas of another schedule": linear,
        }.items():
            for layout in ("linear", "split-einsum"):
                noise_rows[f"{name}, {layout}"] = noises(squeeze, folder, changed(folder, BASE, **keys), layout)
                print(name, layout, noise_rows[f"{name}, {layout}"], flush=True)
        for layout in ("linear", "split-einsum"):
            refiner_rows[layout] = refiners(squeeze, folder, refiner, layout)
            print("refiner", layout, refiner_rows[layout], flush=True)
    (out / "swift.json").write_text(json.dumps({"pictures": rows, "noise": noise_rows, "refiner": refiner_rows}, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1] == "--operations":
        operations(sys.argv[2])
    else:
        main(*sys.argv[1:])
