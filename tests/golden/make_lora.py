"""Makes LoRA files for base-like in every dialect, and the merged weights by diffusers and LyCORIS.

    python make_lora.py base-like lora        # needs peft==0.21.2 and lycoris-lora

Each NAME.safetensors is a LoRA file. `merged.safetensors` has `NAME/PART/TENSOR`: the merged tensor in fp32, from base-like's
weights in fp32, for every tensor that the file changes. `diffusers`, `kohya`, `sgm` and `dora` are merged by `load_lora_weights`
and `fuse_lora(lora_scale=SCALE)`. `lycoris`, whose forms diffusers does not read, is merged by LyCORIS's `diff_weight` times SCALE,
and `dora-kohya` by its `weight_decompose` with a scale of 1 (with others, LyCORIS and peft disagree on DoRA).
"""
import sys
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline
from lycoris.functional import locon, loha, lokr
from lycoris.functional.general import rebuild_tucker, weight_decompose
from safetensors.torch import save_file

SCALE = 0.75
BLOCK = "down_blocks.1.attentions.0.transformer_blocks.0"
TEXT = "text_model.encoder.layers.0"
UNET = ["conv_in", "down_blocks.1.attentions.0.proj_in", f"{BLOCK}.attn1.to_q", f"{BLOCK}.attn2.to_out.0", f"{BLOCK}.ff.net.2",
        "mid_block.resnets.0.conv1", "up_blocks.0.attentions.1.transformer_blocks.1.attn2.to_k"]
ENCODER = [f"{TEXT}.self_attn.q_proj", f"{TEXT}.mlp.fc1"]
SGM = {"down_blocks.1.attentions.0.proj_in": "input_blocks_4_1_proj_in",
       f"{BLOCK}.attn1.to_q": "input_blocks_4_1_transformer_blocks_0_attn1_to_q",
       f"{BLOCK}.ff.net.2": "input_blocks_4_1_transformer_blocks_0_ff_net_2",
       "mid_block.resnets.0.conv1": "middle_block_0_in_layers_2",
       "up_blocks.0.attentions.1.transformer_blocks.1.attn2.to_k": "output_blocks_1_1_transformer_blocks_1_attn2_to_k"}
generator = torch.Generator().manual_seed(31)


def random(*shape):
    return 0.2 * torch.randn(*shape, generator=generator)


def pair(weight, rank=2):
    """The factors of a LoRA: down and up."""
    if weight.dim() == 4:
        return random(rank, *weight.shape[1:]), random(weight.shape[0], rank, 1, 1)
    return random(rank, weight.shape[1]), random(weight.shape[0], rank)


def parts(pipe):
    return {"unet": pipe.unet, "text_encoder": pipe.text_encoder, "text_encoder_2": pipe.text_encoder_2}


def weight_of(module, name):
    """A module's weight; transformers 5 leaves `text_model.` out of the paths of modules."""
    for path in (name, name.removeprefix("text_model.")):
        try:
            return module.get_submodule(path).weight
        except AttributeError:
            pass
    raise KeyError(name)


def modules(pipe):
    for part, network in parts(pipe).items():
        for name in UNET if part == "unet" else ENCODER:
            yield part, name, weight_of(network, name).detach()


def diffusers_file(pipe):
    tensors = {}
    for part, name, weight in modules(pipe):
        down, up = pair(weight)
        tensors |= {f"{part}.{name}.lora_A.weight": down, f"{part}.{name}.lora_B.weight": up}
    return tensors


def kohya_file(pipe):
    prefix = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
    tensors = {}
    for part, name, weight in modules(pipe):
        # diffusers 0.42.1 with transformers 5 warns of the text encoders' attentions in kohya's names, and leaves them out.
        if part != "unet" and "self_attn" in name:
            continue
        stem = prefix[part] + name.replace(".", "_")
        down, up = pair(weight, rank=3)
        tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": torch.tensor(1.5)}
    return tensors


def dora_file(pipe):
    tensors = {}
    for part, name, weight in modules(pipe):
        if part == "unet":
            down, up = pair(weight)
            norms = weight.flatten(1).norm(dim=1) * (1 + random(weight.shape[0]))
            # The norms of a convolution are [1, o, 1, 1] in peft.
            norms = norms.reshape(1, -1, 1, 1) if weight.dim() == 4 else norms
            tensors |= {f"unet.{name}.lora_A.weight": down, f"unet.{name}.lora_B.weight": up,
                        f"unet.{name}.lora_magnitude_vector": norms}
    return tensors


def dora_kohya(pipe):
    """A file with norms of output channels and of input channels, and the merged weights."""
    tensors, merged = {}, {}
    for number, name in enumerate([f"{BLOCK}.attn1.to_q", f"{BLOCK}.ff.net.2", "mid_block.resnets.0.conv1", "conv_in"]):
        weight = weight_of(pipe.unet, name).detach()
        down, up = pair(weight)
        changed = weight + (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
        by_output = number % 2 == 0
        shape = [weight.shape[0]] + [1] * (weight.dim() - 1) if by_output else [1, weight.shape[1]] + [1] * (weight.dim() - 2)
        norms = 1 + random(*shape)
        stem = "lora_unet_" + name.replace(".", "_")
        tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.dora_scale": norms}
        merged[f"unet/{name}.weight"] = weight_decompose(changed, norms, 1, by_output)
    return tensors, merged


def sgm_file(pipe):
    tensors = {}
    for name, stored in SGM.items():
        down, up = pair(weight_of(pipe.unet, name).detach(), rank=4)
        stem = f"lora_unet_{stored}"
        tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": torch.tensor(2.0)}
    return tensors


def merge(folder, file):
    """The merged weights of every module, by diffusers."""
    pipe = StableDiffusionXLPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    before = {(part, name): weight.clone() for part, name, weight in modules(pipe)}
    pipe.load_lora_weights(str(file))
    pipe.fuse_lora(lora_scale=SCALE)
    pipe.unload_lora_weights()
    merged = {}
    for part, name, weight in modules(pipe):
        if not torch.equal(weight, before[part, name]):
            merged[f"{part}/{name}.weight"] = weight.clone()
    return merged


def lycoris(pipe):
    """A file of LyCORIS's forms, and the merged weights."""
    tensors, merged = {}, {}

    def add(name, rank, alpha, pieces, change):
        stem = "lora_unet_" + name.replace(".", "_")
        tensors.update({f"{stem}.{piece}": tensor.contiguous() for piece, tensor in pieces.items()})
        if alpha is not None:
            tensors[f"{stem}.alpha"] = torch.tensor(alpha)
        weight = weight_of(pipe.unet, name).detach()
        merged[f"unet/{name}.weight"] = weight + SCALE * change.reshape(weight.shape)

    name = f"{BLOCK}.attn1.to_q"
    o, i = weight_of(pipe.unet, name).shape
    w1a, w1b, w2a, w2b = random(o, 2), random(2, i), random(o, 2), random(2, i)
    pieces = {"hada_w1_a": w1a, "hada_w1_b": w1b, "hada_w2_a": w2a, "hada_w2_b": w2b}
    add(name, 2, 1.0, pieces, loha.diff_weight(w1b, w1a, w2b, w2a, None, None, gamma=0.5))

    name = "mid_block.resnets.0.conv1"
    o, i, *k = weight_of(pipe.unet, name).shape
    w1a, w1b, w2a, w2b, t1, t2 = random(2, o), random(2, i), random(2, o), random(2, i), random(2, 2, *k), random(2, 2, *k)
    pieces = {"hada_w1_a": w1a, "hada_w1_b": w1b, "hada_w2_a": w2a, "hada_w2_b": w2b, "hada_t1": t1, "hada_t2": t2}
    add(name, 2, 1.0, pieces, loha.diff_weight(w1b, w1a, w2b, w2a, t1, t2, gamma=0.5))

    name = f"{BLOCK}.ff.net.2"
    o, i = weight_of(pipe.unet, name).shape
    w1, w2a, w2b = random(4, 4), random(o // 4, 2), random(2, i // 4)
    pieces = {"lokr_w1": w1, "lokr_w2_a": w2a, "lokr_w2_b": w2b}
    add(name, 2, 1.0, pieces, lokr.diff_weight(w1, None, None, None, w2a, w2b, None, gamma=1.0))

    name = f"{BLOCK}.attn2.to_out.0"
    o, i = weight_of(pipe.unet, name).shape
    w1, w2 = random(2, 4), random(o // 2, i // 4)
    add(name, None, 3.0, {"lokr_w1": w1, "lokr_w2": w2}, torch.kron(w1, w2))

    name = "down_blocks.1.resnets.1.conv1"
    o, i, *k = weight_of(pipe.unet, name).shape
    w1a, w1b, w2 = random(2, 2), random(2, 4), random(o // 2, i // 4, *k)
    pieces = {"lokr_w1_a": w1a, "lokr_w1_b": w1b, "lokr_w2": w2}
    add(name, 2, 3.0, pieces, lokr.diff_weight(None, w1a, w1b, w2, None, None, None, gamma=3.0))

    name = "down_blocks.2.resnets.1.conv1"
    o, i, *k = weight_of(pipe.unet, name).shape
    w1, w2a, w2b, t2 = random(4, 2), random(3, o // 4), random(3, i // 2), random(3, 3, *k)
    pieces = {"lokr_w1": w1, "lokr_w2_a": w2a, "lokr_w2_b": w2b, "lokr_t2": t2}
    # `lokr.diff_weight` divides by the wrong dimension of w2a here; LyCORIS's modules divide by the rank.
    add(name, 3, 1.0, pieces, torch.kron(w1[:, :, None, None].contiguous(), rebuild_tucker(t2, w2a, w2b).contiguous()) / 3)

    name = "down_blocks.1.resnets.0.conv1"
    o, i, *k = weight_of(pipe.unet, name).shape
    down, up, mid = random(2, i, 1, 1), random(o, 2, 1, 1), random(2, 2, *k)
    pieces = {"lora_down.weight": down, "lora_up.weight": up, "lora_mid.weight": mid}
    add(name, 2, 1.0, pieces, locon.diff_weight(down, up, mid, gamma=0.5))

    weight, bias = weight_of(pipe.unet, "conv_in").detach(), pipe.unet.conv_in.bias.detach()
    difference, of_bias = random(*weight.shape), random(*bias.shape)
    tensors |= {"lora_unet_conv_in.diff": difference, "lora_unet_conv_in.diff_b": of_bias}
    merged |= {"unet/conv_in.weight": weight + SCALE * difference, "unet/conv_in.bias": bias + SCALE * of_bias}
    return tensors, merged


def main(folder, out):
    pipe = StableDiffusionXLPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    everything = {}
    for case, make in {"diffusers": diffusers_file, "kohya": kohya_file, "sgm": sgm_file, "dora": dora_file}.items():
        tensors = make(pipe)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out / f"{case}.safetensors")
        merged = merge(folder, out / f"{case}.safetensors")
        wanted = {name.rsplit(".lora", 1)[0] for name in tensors if ".lora_down" in name or ".lora_A" in name}
        assert len(merged) == len(wanted), (case, len(merged), len(wanted))
        everything |= {f"{case}/{name}": tensor for name, tensor in merged.items()}
    for case, make in {"lycoris": lycoris, "dora-kohya": dora_kohya}.items():
        tensors, merged = make(pipe)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out / f"{case}.safetensors")
        everything |= {f"{case}/{name}": tensor for name, tensor in merged.items()}
    save_file({name: tensor.contiguous() for name, tensor in everything.items()}, out / "merged.safetensors")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
