"""Runs a UNet on seeded inputs, so that values, time and memory can be compared.

    python make_unet_forward.py MODEL_DIR --latent 64 --seed 0 --out FILE.safetensors [--repeat N] [--threads N]

FILE gets the inputs and the output. The script prints one line of JSON: seconds to load, seconds of each forward, and peak memory.
"""
import argparse
import json
import resource
import time
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file


@torch.no_grad()
def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("model_dir", type=Path)
    options.add_argument("--latent", type=int, default=64)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--out", type=Path, required=True)
    options.add_argument("--repeat", type=int, default=1)
    options.add_argument("--threads", type=int)
    options = options.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)

    begin = time.perf_counter()
    unet = UNet2DConditionModel.from_pretrained(options.model_dir / "unet", dtype=torch.float32).eval()
    load_seconds = time.perf_counter() - begin

    config, generator = unet.config, torch.Generator().manual_seed(options.seed)
    ids = torch.tensor([[512.0, 512, 0, 0, 512, 512]])
    pooled = config.projection_class_embeddings_input_dim - ids.shape[1] * config.addition_time_embed_dim
    given = {
        "sample": torch.randn(1, config.in_channels, options.latent, options.latent, generator=generator),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 77, config.cross_attention_dim, generator=generator),
        "text_embeds": torch.randn(1, pooled, generator=generator),
        "time_ids": ids,
    }
    added, seconds = dict(text_embeds=given["text_embeds"], time_ids=ids), []
    for _ in range(options.repeat):
        begin = time.perf_counter()
        output = unet(given["sample"], given["timestep"], given["encoder_hidden_states"], added_cond_kwargs=added).sample
        seconds.append(round(time.perf_counter() - begin, 4))
    save_file({**given, "output": output}, options.out)
    print(json.dumps({
        "load_seconds": round(load_seconds, 4), "forward_seconds": seconds, "threads": torch.get_num_threads(),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "output_mean": float(output.mean()), "output_std": float(output.std()),
    }))


if __name__ == "__main__":
    main()
