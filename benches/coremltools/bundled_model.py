"""The tutorial's recipe on the bundled model by coremltools 9.0, against this project: time, memory and quality on the same samples.

    sdxl-squeeze compress --config configs/tutorial-s40-4bit-gs16.yaml --model models/emoji-sdxl --prompts calibration/emoji.txt \\
        --steps 30 --guidance 4 --calibration-nsamples 128 --out OUT --samples-out OUT/calibration.safetensors
    sdxl-squeeze export OUT/unet.squeezed.safetensors --to diffusers --model models/emoji-sdxl --out OUT/ours
    python benches/coremltools/bundled_model.py --model models/emoji-sdxl --calibration OUT/calibration.safetensors \\
        --held-out OUT/held-out.safetensors --ours OUT/ours

Held-out samples are made as calibration samples are, from other prompts (`--prompts calibration/emoji-judge.txt --samples-out ...`).
Needs torch, diffusers, safetensors and coremltools 9.0. Prints the squared relative error of the UNet's output on the held-out samples
for: SparseGPT 40 % alone, and with 4-bit palettes of 16 channels, by coremltools' LayerwiseCompressor (`weight_dtype="float32"`) over the
UNet's stages and its PostTrainingPalettizer; and for ours.
"""

import argparse
import resource
import time
from pathlib import Path

import torch
from coremltools.optimize.torch.layerwise_compression import LayerwiseCompressor, LayerwiseCompressorConfig, ModuleSparseGPTConfig
from coremltools.optimize.torch.palettization import (
    ModulePostTrainingPalettizerConfig,
    PostTrainingPalettizer,
    PostTrainingPalettizerConfig,
)
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file


class Stage(torch.nn.Module):
    """A block of the UNet that takes and gives everything that goes on."""

    def __init__(self, kind, block):
        super().__init__()
        self.kind, self.block = kind, block

    def forward(self, hidden, temb, states, *residuals):
        block = self.block
        attends = getattr(block, "has_cross_attention", False)
        if self.kind == "down":
            more = {"encoder_hidden_states": states} if attends else {}
            hidden, new = block(hidden_states=hidden, temb=temb, **more)
            residuals = residuals + tuple(new)
        elif self.kind == "mid":
            hidden = block(hidden, temb, encoder_hidden_states=states)
        else:
            count = len(block.resnets)
            own, residuals = residuals[-count:], residuals[:-count]
            more = {"encoder_hidden_states": states} if attends else {}
            hidden = block(hidden_states=hidden, temb=temb, res_hidden_states_tuple=own, **more)
        return (hidden, temb, states, *residuals)


class Chain(torch.nn.Module):
    def __init__(self, unet):
        super().__init__()
        blocks = [("down", block) for block in unet.down_blocks] + [("mid", unet.mid_block)]
        blocks += [("up", block) for block in unet.up_blocks]
        self.stages = torch.nn.ModuleList(Stage(kind, block) for kind, block in blocks)


class Carry(tuple):
    def to(self, _device):
        return tuple(self)


def calls(file):
    tensors = load_file(file)
    for i in range(len(tensors["timestep"])):
        yield {name: tensor[i] for name, tensor in tensors.items()}


def first_carry(unet, call):
    time_emb = unet.time_embedding(unet.time_proj(call["timestep"].expand(call["sample"].shape[0])))
    ids = unet.add_time_proj(call["time_ids"].flatten()).reshape(call["text_embeds"].shape[0], -1)
    temb = time_emb + unet.add_embedding(torch.cat([call["text_embeds"], ids], dim=-1))
    hidden = unet.conv_in(call["sample"])
    return Carry((hidden, temb, call["encoder_hidden_states"], hidden))


@torch.no_grad()
def predict(unet, call):
    added = {"text_embeds": call["text_embeds"], "time_ids": call["time_ids"]}
    return unet(call["sample"], call["timestep"], call["encoder_hidden_states"], added_cond_kwargs=added).sample


def error(unet, held_out, wanted):
    """The squared distance over all calls, relative to the square of what is wanted."""
    got = [predict(unet, call).double() for call in held_out]
    return sum(((a - b) ** 2).sum() for a, b in zip(got, wanted)) / sum((b**2).sum() for b in wanted)


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--held-out", type=Path, required=True)
    parser.add_argument("--ours", type=Path, help="a diffusers folder")
    args = parser.parse_args()
    load = lambda root: UNet2DConditionModel.from_pretrained(root, subfolder="unet", torch_dtype=torch.float32).eval()
    dense = load(args.model)
    held_out = list(calls(args.held_out))
    wanted = [predict(dense, call).double() for call in held_out]
    calibration = list(calls(args.calibration))
    print(f"{len(calibration)} calibration samples, {len(held_out)} held out; peak memory so far {peak():.2f} GiB")

    unet = load(args.model)
    with torch.no_grad():
        carries = [first_carry(unet, call) for call in calibration]
    start = time.perf_counter()
    config = LayerwiseCompressorConfig(
        layers=[r"stages\.\d+"],
        global_config=ModuleSparseGPTConfig(target_sparsity=0.4, weight_dtype="float32"),
        calibration_nsamples=len(carries),
    )
    LayerwiseCompressor(Chain(unet), config).compress(carries, device="cpu", inplace=True)
    pruned = time.perf_counter()
    print(f"SparseGPT 40 %: {pruned - start:.1f} s, peak {peak():.2f} GiB, UNet error {100 * error(unet, held_out, wanted):.2f} %")
    settings = ModulePostTrainingPalettizerConfig(n_bits=4, granularity="per_grouped_channel", group_size=16)
    palettizing = time.perf_counter()
    PostTrainingPalettizer(unet, PostTrainingPalettizerConfig(global_config=settings)).compress(inplace=True)
    end = time.perf_counter()
    print(f"and 4-bit gs16: {end - palettizing:.1f} s more, peak {peak():.2f} GiB, UNet error {100 * error(unet, held_out, wanted):.2f} %")
    print(f"coremltools, both: {pruned - start + end - palettizing:.1f} s")
    if args.ours:
        print(f"ours: UNet error {100 * error(load(args.ours), held_out, wanted):.2f} %")


if __name__ == "__main__":
    main()
