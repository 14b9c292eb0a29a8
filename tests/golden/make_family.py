"""A single-file checkpoint of the SDXL family in small, which its tensors alone describe, and what diffusers draws with it.

    python make_family.py CLIP OUT

CLIP is a folder with openai/clip-vit-large-patch14's files as `tokenizer` and `tokenizer_2`. OUT.json gets the shapes of the
checkpoint's tensors and the settings of the picture, OUT.safetensors the latents. The weights are a function of name and
place (`values`), so that the tests can make the 60 MB again.
"""
import json
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from make_single_file import open_clip, state, unet_name, unet_prefixes, vae_name
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

SETTINGS = dict(prompt="a photo of a cat!, 2 dogs", negative_prompt="Blurry, LOW quality!!", steps=5, guidance=4.0, seed=7, size=64)


def values(name, shape):
    """Noise of the width that suits a layer: about 1 for norms, 0.05 for biases, 1 / sqrt(inputs) for matrices."""
    count = int(np.prod(shape))
    x = (np.arange(count, dtype=np.uint64) + np.uint64(zlib.crc32(name.encode()))) & np.uint64(0xFFFFFFFF)
    for factor in (2654435761, 73244475):
        x = (x * np.uint64(factor)) & np.uint64(0xFFFFFFFF)
        x ^= x >> np.uint64(16)
    unit = x.astype(np.float64) / 4294967296.0 - 0.5
    if len(shape) == 1:
        made = 0.1 * unit + (1.0 if name.endswith("weight") else 0.0)
    else:
        made = 3.0 * unit / np.sqrt(float(count // shape[0]))
    return torch.from_numpy(made.astype(np.float16)).reshape(shape)


def text(width, layers, act):
    return CLIPTextConfig(hidden_size=width, intermediate_size=2 * width, num_attention_heads=width // 64, num_hidden_layers=layers,
                          hidden_act=act, projection_dim=width, vocab_size=49408, bos_token_id=0, eos_token_id=2)


def pipeline_of(clip, in_channels=4, **latents):
    vae = dict(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2)
    vae |= dict(scaling_factor=0.13025) | latents
    parts = dict(
        text_encoder=CLIPTextModel(text(64, 2, "quick_gelu")),
        text_encoder_2=CLIPTextModelWithProjection(text(128, 3, "gelu")),
        tokenizer=CLIPTokenizer.from_pretrained(clip / "tokenizer"), tokenizer_2=CLIPTokenizer.from_pretrained(clip / "tokenizer_2"),
        unet=UNet2DConditionModel(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), block_out_channels=(64, 64, 128),
            attention_head_dim=(1, 1, 2), transformer_layers_per_block=(1, 1, 2), cross_attention_dim=192, sample_size=128,
            addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=128 + 6 * 256,
            use_linear_projection=True, in_channels=in_channels),
        vae=AutoencoderKL(block_out_channels=(32,) * 4, latent_channels=4, **vae),
        scheduler=EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
                                         timestep_spacing="leading"))
    return StableDiffusionXLPipeline(**parts, add_watermarker=False)


def shapes_of(pipeline):
    pairs, shapes = unet_prefixes(pipeline.unet.config), {}
    for name, tensor in state(pipeline.unet).items():
        shapes[unet_name(name, pairs)] = list(tensor.shape)
    for name, tensor in state(pipeline.vae).items():
        shape = list(tensor.shape)
        shapes[vae_name(name, 4)] = shape + [1, 1] if ".attentions." in name and len(shape) == 2 else shape
    for name, tensor in state(pipeline.text_encoder).items():
        bare = name.removeprefix("text_model.")
        shapes[f"conditioner.embedders.0.transformer.text_model.{bare}"] = list(tensor.shape)
    second = state(pipeline.text_encoder_2)
    for name, entry in open_clip(second, 1).items():
        shape = list(second[entry["of"][0].removeprefix("text_encoder_2/")].shape)
        shapes[name] = [shape[0] * len(entry["of"]), *shape[1:]][::-1 if "as" in entry else 1]
    return shapes


def main(clip, out):
    pipeline = pipeline_of(clip)
    shapes = shapes_of(pipeline)
    with tempfile.TemporaryDirectory() as scratch:
        pipeline.save_pretrained(f"{scratch}/configs")
        save_file({name: values(name, shape) for name, shape in shapes.items()}, f"{scratch}/model.safetensors")
        loaded = StableDiffusionXLPipeline.from_single_file(
            f"{scratch}/model.safetensors", config=f"{scratch}/configs", torch_dtype=torch.float32, local_files_only=True)
    latents = loaded(
        SETTINGS["prompt"], negative_prompt=SETTINGS["negative_prompt"], num_inference_steps=SETTINGS["steps"],
        guidance_scale=SETTINGS["guidance"], height=SETTINGS["size"], width=SETTINGS["size"], output_type="latent",
        generator=torch.Generator().manual_seed(SETTINGS["seed"])).images
    print(latents.std(), latents.abs().max())
    save_file({"latents": latents.contiguous()}, f"{out}.safetensors")
    notes = dict(SETTINGS, tensors=dict(sorted(shapes.items())))
    Path(f"{out}.json").write_text(json.dumps(notes, separators=(",", ":")).replace('],"', '],\n"') + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
