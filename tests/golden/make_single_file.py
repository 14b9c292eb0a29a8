"""Says how diffusers folders are stored in single-file checkpoints, and checks it with diffusers.

    python make_single_file.py FOLDER OUT.json

FOLDER is a pipeline in diffusers layout. OUT.json has, for each tensor of the single file, the tensors of the folder that it is
made of: `of` are their names (`unet/…`, `vae/…`, `text_encoder/…`, `text_encoder_2/…`), stacked along the first dimension;
`as` is `transposed` or `convolution` ([o, i] as [o, i, 1, 1]) where the stored form is another.

The names follow the published checkpoints: sd_xl_base_1.0.safetensors and sd_xl_refiner_1.0.safetensors. The file is made and
read with `from_single_file`; every part must then have exactly the tensors of the folder.
"""
import json
import sys
import tempfile
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import save_file

RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
          "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}


def unet_prefixes(config):
    """Pairs of a module's path in the sgm code and in diffusers, longest first."""
    pairs = [("time_embed.0", "time_embedding.linear_1"), ("time_embed.2", "time_embedding.linear_2"),
             ("label_emb.0.0", "add_embedding.linear_1"), ("label_emb.0.2", "add_embedding.linear_2"),
             ("input_blocks.0.0", "conv_in"), ("out.0", "conv_norm_out"), ("out.2", "conv_out")]
    levels, layers = len(config.block_out_channels), config.layers_per_block
    layers = [layers] * levels if isinstance(layers, int) else list(layers)
    number = 1
    for level in range(levels):
        for i in range(layers[level]):
            pairs.append((f"input_blocks.{number}.0", f"down_blocks.{level}.resnets.{i}"))
            if "CrossAttn" in config.down_block_types[level]:
                pairs.append((f"input_blocks.{number}.1", f"down_blocks.{level}.attentions.{i}"))
            number += 1
        if level < levels - 1:
            pairs.append((f"input_blocks.{number}.0.op", f"down_blocks.{level}.downsamplers.0.conv"))
            number += 1
    pairs += [("middle_block.0", "mid_block.resnets.0"), ("middle_block.1", "mid_block.attentions.0"),
              ("middle_block.2", "mid_block.resnets.1")]
    number = 0
    for level in range(levels):
        for i in range(layers[levels - 1 - level] + 1):
            attends = "CrossAttn" in config.up_block_types[level]
            pairs.append((f"output_blocks.{number}.0", f"up_blocks.{level}.resnets.{i}"))
            if attends:
                pairs.append((f"output_blocks.{number}.1", f"up_blocks.{level}.attentions.{i}"))
            if i == layers[levels - 1 - level] and level < levels - 1:
                pairs.append((f"output_blocks.{number}.{2 if attends else 1}.conv", f"up_blocks.{level}.upsamplers.0.conv"))
            number += 1
    return sorted(pairs, key=lambda pair: -len(pair[1]))


def unet_name(name, pairs):
    stored, path = next((stored, path) for stored, path in pairs if name.startswith(path + "."))
    leaf = name[len(path) + 1:]
    if ".resnets." in path:
        layer, kind = leaf.rsplit(".", 1)
        leaf = f"{RESNET[layer]}.{kind}"
    return f"model.diffusion_model.{stored}.{leaf}"


def vae_name(name, levels):
    for stored, path in [("mid.block_1", "mid_block.resnets.0"), ("mid.block_2", "mid_block.resnets.1"),
                         ("mid.attn_1.norm", "mid_block.attentions.0.group_norm"), ("mid.attn_1.q", "mid_block.attentions.0.to_q"),
                         ("mid.attn_1.k", "mid_block.attentions.0.to_k"), ("mid.attn_1.v", "mid_block.attentions.0.to_v"),
                         ("mid.attn_1.proj_out", "mid_block.attentions.0.to_out.0"), ("nin_shortcut", "conv_shortcut"),
                         ("norm_out", "conv_norm_out"), ("downsample.conv", "downsamplers.0.conv"),
                         ("upsample.conv", "upsamplers.0.conv"), ("block", "resnets")]:
        name = name.replace(f".{path}.", f".{stored}.")
    for level in range(levels):
        name = name.replace(f"encoder.down_blocks.{level}.", f"encoder.down.{level}.")
        name = name.replace(f"decoder.up_blocks.{level}.", f"decoder.up.{levels - 1 - level}.")
    return f"first_stage_model.{name}"


def open_clip(names, embedder):
    stored = {}
    prefix = f"conditioner.embedders.{embedder}.model."
    for name in names:
        bare = name.removeprefix("text_model.")
        if bare == "text_projection.weight":
            stored[prefix + "text_projection"] = {"of": ["text_encoder_2/" + name], "as": "transposed"}
            continue
        if bare == "embeddings.position_embedding.weight":
            bare = "positional_embedding"
        elif bare == "embeddings.token_embedding.weight":
            bare = "token_embedding.weight"
        for new, old in [("ln_final", "final_layer_norm"), ("transformer.resblocks", "encoder.layers"), ("ln_1", "layer_norm1"),
                         ("ln_2", "layer_norm2"), ("mlp.c_fc", "mlp.fc1"), ("mlp.c_proj", "mlp.fc2"),
                         ("attn.out_proj", "self_attn.out_proj")]:
            bare = bare.replace(f"{old}.", f"{new}.")
        if ".self_attn." in bare:
            layer, kind = bare.split(".self_attn.")[0], bare.rsplit(".", 1)[1]
            of = [f"text_encoder_2/{name.rsplit('.self_attn.', 1)[0]}.self_attn.{part}_proj.{kind}" for part in "qkv"]
            stored[f"{prefix}{layer}.attn.in_proj_{kind}"] = {"of": of}
        else:
            stored[prefix + bare] = {"of": ["text_encoder_2/" + name]}
    return stored


def state(module):
    return {name: tensor for name, tensor in module.state_dict().items() if not name.endswith("position_ids")}


def main(folder, out):
    index = json.loads((folder / "model_index.json").read_text())
    kind = StableDiffusionXLImg2ImgPipeline if "Img2Img" in index["_class_name"] else StableDiffusionXLPipeline
    pipeline = kind.from_pretrained(folder, torch_dtype=torch.float16)
    parts = {part: getattr(pipeline, part) for part in ["unet", "vae", "text_encoder", "text_encoder_2"] if getattr(pipeline, part)}
    tensors = {f"{part}/{name}": tensor for part, module in parts.items() for name, tensor in state(module).items()}

    pairs = unet_prefixes(pipeline.unet.config)
    stored = {unet_name(name, pairs): {"of": ["unet/" + name]} for name in state(pipeline.unet)}
    for name, tensor in state(pipeline.vae).items():
        entry = {"of": ["vae/" + name]}
        if ".attentions." in name and tensor.dim() == 2:
            entry["as"] = "convolution"
        stored[vae_name(name, len(pipeline.vae.config.block_out_channels))] = entry
    first = "text_encoder" in parts
    if first:
        for name in state(pipeline.text_encoder):
            bare = name.removeprefix("text_model.")
            stored[f"conditioner.embedders.0.transformer.text_model.{bare}"] = {"of": ["text_encoder/" + name]}
    stored |= open_clip(state(pipeline.text_encoder_2), 1 if first else 0)

    made = {}
    for name, entry in stored.items():
        tensor = torch.cat([tensors[part] for part in entry["of"]])
        if entry.get("as") == "transposed":
            tensor = tensor.T
        elif entry.get("as") == "convolution":
            tensor = tensor[:, :, None, None]
        made[name] = tensor.contiguous()
    used = [name for entry in stored.values() for name in entry["of"]]
    assert sorted(used) == sorted(tensors), set(used) ^ set(tensors)

    with tempfile.TemporaryDirectory() as scratch:
        path = f"{scratch}/model.safetensors"
        save_file(made, path)
        given = dict(config=str(folder), torch_dtype=torch.float16, local_files_only=True)
        loaded = {"unet": UNet2DConditionModel.from_single_file(path, subfolder="unet", **given),
                  "vae": AutoencoderKL.from_single_file(path, subfolder="vae", **given)}
        projection = pipeline.text_encoder_2.config
        checked = ["unet", "vae"]
        # diffusers divides the attentions of OpenCLIP by the width of the projection, which is that of the states in SDXL.
        if projection.projection_dim == projection.hidden_size:
            whole = kind.from_single_file(path, **given)
            loaded |= {part: getattr(whole, part) for part in parts if part.startswith("text")}
            checked = list(parts)
        for part in checked:
            theirs, ours = state(loaded[part]), state(parts[part])
            assert theirs.keys() == ours.keys(), (part, theirs.keys() ^ ours.keys())
            for name, tensor in ours.items():
                assert torch.equal(theirs[name], tensor), (part, name)
    notes = {"checked_with_from_single_file": checked, "tensors": dict(sorted(stored.items()))}
    out.write_text(json.dumps(notes, separators=(",", ":")).replace('},"', '},\n"') + "\n")
    print(f"{out}: {len(stored)} tensors; from_single_file gives the folder's own tensors of {', '.join(checked)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
