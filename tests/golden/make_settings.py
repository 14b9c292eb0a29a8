"""Writes what diffusers' UNets and transformers' text encoders compute with unusual configs, for tests/it/settings.rs.

    python tests/golden/make_settings.py tests/golden/settings.json

A UNet's line has the keys that differ from those of UNET, and some numbers of its output: of the flattened tensor every STRIDE-th, and
the root of the mean square. The weights are a function of name and place (`values` of make_family.py), in fp32 from fp16. `refused` are
keys that diffusers takes and this project refuses by name, because no SDXL model has them. A text encoder's line has its
`eos_token_id` (absent: none in the config) and its pooled states of the lists of ids.
"""

import json
import logging
import pathlib
import sys

import torch
from diffusers import UNet2DConditionModel
from make_family import values
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

STRIDE = 17
DOWN, CROSS_DOWN, UP, CROSS_UP = "DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"
UNET = {
    "_class_name": "UNet2DConditionModel", "sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": [8, 16],
    "down_block_types": [DOWN, CROSS_DOWN], "up_block_types": [CROSS_UP, UP], "layers_per_block": 1, "attention_head_dim": [2, 4],
    "transformer_layers_per_block": [1, 2], "cross_attention_dim": 12, "norm_num_groups": 4, "use_linear_projection": True,
    "addition_embed_type": "text_time", "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 34,
}
UNETS = [
    {},
    {"attention_head_dim": 2},
    {"attention_head_dim": [4, 2]},
    {"num_attention_heads": None},
    {"use_linear_projection": False},
    {"norm_num_groups": 2},
    {"norm_eps": 1e-3},
    {"downsample_padding": 0},
    {"conv_in_kernel": 5},
    {"conv_out_kernel": 1},
    {"flip_sin_to_cos": False},
    {"freq_shift": 1},
    {"center_input_sample": True},
    {"time_embedding_dim": 24},
    {"layers_per_block": 2},
    {"layers_per_block": [1, 2]},
    {"layers_per_block": [2, 1]},
    {"transformer_layers_per_block": 2},
    {"transformer_layers_per_block": [2, 1]},
    {"transformer_layers_per_block": [1, [2]], "reverse_transformer_layers_per_block": [[1, 2], 1]},
    {"reverse_transformer_layers_per_block": [1, 2]},
    {"mid_block_type": None},
    {"mid_block_type": "UNetMidBlock2D"},
    {"sample_size": [8, 16]},
    {"in_channels": 8},
    {"in_channels": 9},
    {"out_channels": 3},
    {"cross_attention_dim": [12, 12]},
    {"cross_attention_dim": 20},
    {"only_cross_attention": False},
    {"only_cross_attention": [False, False]},
    {"down_block_types": [CROSS_DOWN, CROSS_DOWN], "up_block_types": [CROSS_UP, CROSS_UP]},
    {"down_block_types": [CROSS_DOWN, DOWN], "up_block_types": [CROSS_UP, CROSS_UP]},
    {"down_block_types": [DOWN, DOWN], "up_block_types": [UP, UP]},
    {"block_out_channels": [8, 16, 24], "down_block_types": [DOWN, CROSS_DOWN, CROSS_DOWN], "up_block_types": [CROSS_UP, CROSS_UP, UP],
     "attention_head_dim": [2, 4, 6], "transformer_layers_per_block": [1, 1, 2]},
    {"block_out_channels": [8, 8]},
    {"addition_time_embed_dim": 6, "projection_class_embeddings_input_dim": 46},
    {"time_cond_proj_dim": 16},
    {"dropout": 0.5},
    {"upcast_attention": True},
    {"act_fn": "swish"},
    {"attention_type": "default", "resnet_time_scale_shift": "default", "time_embedding_type": "positional", "class_embed_type": None},
]
REFUSED = {
    "act_fn": "gelu", "resnet_time_scale_shift": "scale_shift", "dual_cross_attention": True, "mid_block_scale_factor": 2,
    "resnet_out_scale_factor": 1.5, "resnet_skip_time_act": True, "time_embedding_act_fn": "silu", "timestep_post_act": "silu",
    "class_embed_type": "timestep", "num_class_embeds": 10, "cross_attention_norm": "layer_norm", "attention_type": "gated",
    "only_cross_attention": True, "only_cross_attention ": [True, False], "num_attention_heads": 2,
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn", "encoder_hid_dim": 12,
}
EOS = [2, 49407, None, 320, 9999]
IDS = [
    [49406, 320, 2368, 49407, 49407, 49407, 49407, 49407],
    [49406, 320, 2368, 49407, 0, 0, 0, 0],
    [49406, 2, 320, 49407, 518, 49407, 0, 0],
    [49406, 518, 518, 2368, 320, 518, 518, 49407],
]


def load(model):
    own = model.state_dict()
    model.load_state_dict({name: values(name, list(tensor.shape)).to(tensor.dtype) for name, tensor in own.items()})
    return model.eval()


def made(name, *shape):
    return values(name, list(shape)).float()


def unet(keys):
    config = {**UNET, **keys}
    model = load(UNet2DConditionModel.from_config(config))
    pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
    width = config["cross_attention_dim"]
    width = width[0] if isinstance(width, list) else width
    told = config.get("time_cond_proj_dim")
    # Sizes that do not halve evenly.
    out = model(
        made("sample", 2, config["in_channels"], 5, 7), 481, made("states", 2, 6, width),
        timestep_cond=made("guidance", 2, told) if told else None,
        added_cond_kwargs={"text_embeds": made("pooled", 2, pooled), "time_ids": torch.tensor([[40.0, 56, 0, 8, 40, 56]] * 2)},
    ).sample
    numbers = out.flatten()[::STRIDE].tolist()
    return [round(number, 6) for number in [*numbers, float(out.square().mean().sqrt())]]


def text(eos):
    told = {} if eos is None else {"eos_token_id": eos}
    config = CLIPTextConfig(
        vocab_size=49408, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, projection_dim=6,
        max_position_embeddings=8, bos_token_id=0, pad_token_id=1, **told)
    model = CLIPTextModelWithProjection(config)
    own = model.state_dict()
    model.load_state_dict({name: values(name.removeprefix("text_model."), list(tensor.shape)).float() if tensor.is_floating_point() else tensor
                           for name, tensor in own.items()})
    pooled = model.eval()(torch.tensor(IDS)).text_embeds
    return [[round(number, 6) for number in row] for row in pooled.tolist()]


@torch.no_grad()
def main(out):
    logging.disable(logging.WARNING)
    lines = [json.dumps({"keys": keys, "output": unet(keys)}) for keys in UNETS]
    refused = []
    for key, value in REFUSED.items():
        key = key.strip()
        try:
            UNet2DConditionModel.from_config({**UNET, key: value})
            runs = True
        except Exception:  # diffusers refuses it too, in one way or another
            runs = False
        refused.append(json.dumps({"key": key, "value": value, "diffusers_builds_it": runs}))
    texts = [json.dumps({"eos_token_id": eos, "pooled": text(eos)}) for eos in EOS]
    body = [f'"unet": {json.dumps(UNET)}', f'"stride": {STRIDE}', '"unets": [\n' + ",\n".join(lines) + "\n]",
            '"refused": [\n' + ",\n".join(refused) + "\n]", f'"ids": {json.dumps(IDS)}', '"texts": [\n' + ",\n".join(texts) + "\n]"]
    pathlib.Path(out).write_text("{" + ",\n".join(body) + "}\n")


if __name__ == "__main__":
    main(sys.argv[1])
