"""Checks Core ML packages of text encoders and of a VAE's halves, without any of the Rust code.

    python check_coreml_parts.py PACKAGE --part text_encoder|text_encoder_2|vae_decoder|vae_encoder --model MODELDIR [--container FILE]
    python check_coreml_parts.py --all SDXL-SQUEEZE OUT.json     # every part of the models of this repository
    python check_coreml_parts.py --operations OUT.json           # the parameters of operations in networks that coremltools converts

1. loader: as check_coreml.py.
2. values: each tensor of the network is materialized by coremltools and equals the stored tensor,
   rounded to fp16, bit for bit; where the network is computed in fp32, its value.
3. forward: mil_torch.py evaluates the program in fp32, and each output is within 1e-4 of that of
   transformers' or diffusers' network with the same weights. The program is also evaluated with
   every value that it declares as fp16 rounded to fp16.

A compressed network's MODELDIR has its decoded weights (`export --to diffusers`). With --container, the
tensors are compared with those that check_coreml.py decodes from the container.

--all also compresses the text encoders and the VAE's decoder of each model. A package that misses is in
the file with what it missed, and the script then ends with code 1.
"""

import argparse
import json
import pathlib
import re
import subprocess
import sys
import tempfile

import numpy as np
import torch
from check_coreml import Stored, loader, patterns
from mil_torch import Package, evaluate

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
MODELS = [ROOT / "models/emoji-sdxl", HERE / "base-like", HERE / "refiner-like", HERE / "v-prediction"]
PARTS = ["text_encoder", "text_encoder_2", "vae_decoder", "vae_encoder"]
PROMPTS = ["", "a cat", "an emoji of a red apple, oil on canvas, very detailed " * 12]


def rounded(module):
    """The module in fp32, with weights that fp16 holds."""
    for parameter in module.parameters():
        parameter.data = parameter.data.half().float()
    return module.eval()


def text_network(model, part):
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    config = json.loads((model / part / "config.json").read_text())
    kind = {"CLIPTextModel": CLIPTextModel, "CLIPTextModelWithProjection": CLIPTextModelWithProjection}[config["architectures"][0]]
    variant = {"variant": "fp16"} if (model / part / "model.fp16.safetensors").exists() else {}
    return rounded(kind.from_pretrained(model / part, dtype=torch.float32, **variant))


def vae_network(model):
    from diffusers import AutoencoderKL

    return rounded(AutoencoderKL.from_pretrained(model / "vae", torch_dtype=torch.float32))


def text_calls(model, part):
    """Ids, and what transformers makes of them."""
    from transformers import CLIPTokenizer

    network = text_network(model, part)
    tokenizer = CLIPTokenizer.from_pretrained(model / part.replace("text_encoder", "tokenizer"))
    length = network.config.max_position_embeddings
    rows = [tokenizer(prompt, padding="max_length", truncation=True, max_length=length, return_tensors="pt").input_ids for prompt in PROMPTS]
    # The end's id twice, and the highest id in the midst of the text.
    torch.manual_seed(3)
    rows.append(torch.randint(1, network.config.vocab_size, (1, length)))
    for ids in rows:
        with torch.no_grad():
            made = network(ids, output_hidden_states=True)
        pooled = made.text_embeds if hasattr(made, "text_embeds") else made.pooler_output
        yield {"input_ids": ids.float()}, {"hidden_embeds": made.hidden_states[-2], "pooled_outputs": pooled}


def vae_calls(model, part, shape):
    network = vae_network(model)
    torch.manual_seed(4)
    given = torch.randn(shape).half().float()
    with torch.no_grad():
        if part == "vae_decoder":
            yield {"z": given}, {"image": network.decode(given).sample}
        else:
            given = given.clamp(-1, 1)
            encoded = network.encoder(given)
            encoded = encoded if network.quant_conv is None else network.quant_conv(encoded)
            yield {"x": given}, {"latent": encoded}


def stored(model, part, container=None):
    """The network's tensors by name, rounded to fp16, or those of a container."""
    if container:
        tensors = Stored(container)
        return {name: tensors.tensor(name) for name in tensors.names if part != "vae_decoder" or not name.startswith(("encoder.", "quant_conv."))}
    if part.startswith("text"):
        network = text_network(model, part)
        named = dict(network.named_parameters())
        prefixed = {name if name.startswith(("text_model.", "text_projection.")) else f"text_model.{name}": x for name, x in named.items()}
        return {name: x.detach().half().numpy() for name, x in prefixed.items()}
    named = dict(vae_network(model).named_parameters())
    halves = {"vae_decoder": ("decoder.", "post_quant_conv."), "vae_encoder": ("encoder.", "quant_conv.")}[part]
    return {name: x.detach().half().numpy() for name, x in named.items() if name.startswith(halves)}


def values(program, tensors):
    left = {re.sub(r"[^A-Za-z0-9]", "_", name): tensor for name, tensor in tensors.items()}
    assert len(left) == len(tensors)
    for op in program.functions["main"].operations:
        wanted = left.pop(op.outputs[0].name, None)
        if wanted is None:
            continue
        made = np.asarray(op.materialized_val_inference() if op.op_type.startswith("constexpr_") else op.outputs[0].val)
        assert made.dtype in (np.float16, np.float32), (op.outputs[0].name, made.dtype)
        assert np.array_equal(made, wanted.reshape(made.shape).astype(made.dtype)), f"{op.outputs[0].name} differs"
    assert not left, f"not in the program: {sorted(left)[:5]}"
    compressed = [op for op in program.functions["main"].operations if op.op_type == "constexpr_lut_to_dense"]
    return {"tensors_equal_bit_for_bit": len(tensors), "of_them_compressed": len(compressed)}


def forward(package, calls):
    error = lambda made, wanted: float((made - wanted).double().norm() / wanted.double().norm())
    single, half = 0.0, 0.0
    for given, wanted in calls:
        made, narrow = evaluate(package, given), evaluate(package, given, half=True)
        assert list(made) == list(wanted), list(made)
        single = max([single, *(error(made[name], wanted[name]) for name in wanted)])
        half = max([half, *(error(narrow[name], wanted[name]) for name in wanted)])
    assert single < 1e-4, f"relative error {single}"
    assert half < 3e-2, f"relative error {half} in fp16"
    return {"relative_error_fp32": float(f"{single:.2g}"), "relative_error_fp16": float(f"{half:.2g}")}


def check(path, part, model, container=None):
    program, row = loader(path)
    package = Package(path)
    shape = next(iter(package.inputs.values()))[1]
    calls = text_calls(model, part) if part.startswith("text") else vae_calls(model, part, shape)
    row |= values(program, stored(model, part, container)) | forward(package, calls)
    if container:
        assert row["of_them_compressed"] == len(Stored(container).rows) > 0, row
    return row


def run(*arguments):
    done = subprocess.run(list(map(str, arguments)), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0, f"{arguments[1]}: {done.stderr}"


def compressed(squeeze, model, folder):
    """Compresses text encoders and VAE. Returns the containers by network, and the model with the decoded weights."""
    config = (ROOT / "configs/emoji/squeeze-text-vae.yaml").read_text()
    for section in ("text_encoders", "vae"):
        # Most layers of the small models have few weights.
        config = config.replace(f"{section}:\n", f"{section}:\n  weight_threshold: 500\n")
    (folder / "config.yaml").write_text(config)
    out = folder / f"{model.name}-compressed"
    run(squeeze, "compress", "--config", folder / "config.yaml", "--model", model, "--calibration-nsamples", 4, "--steps", 4, "--out", out)
    containers = {path.name.split(".")[0]: path for path in sorted(out.glob("*.squeezed.safetensors"))}
    decoded = folder / f"{model.name}-decoded"
    run(squeeze, "export", model, "--to", "diffusers", *flags(containers), "--out", decoded)
    return containers, decoded


def flags(containers):
    return [flag for name, path in containers.items() for flag in (f"--{name.replace('_', '-')}", path)]


def check_all(squeeze, out):
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        for model in MODELS:
            for dense in (True, False):
                containers, weights = ({}, model) if dense else compressed(squeeze, model, folder)
                for part in PARTS:
                    network = part if part.startswith("text") else "vae"
                    if not (model / network).exists() or not dense and part == "vae_encoder":
                        continue
                    name = f"{model.name}, {part}" + ("" if dense else ", compressed")
                    package = folder / f"{name}.mlpackage"
                    try:
                        run(squeeze, "export", model, "--to", "coreml", "--part", part, *flags(containers), "--out", package)
                        run(squeeze, "verify", package)
                        if not dense:
                            run(squeeze, "verify", containers[network])
                        found[name] = check(package, part, weights, containers.get(network))
                    except AssertionError as miss:
                        found[name] = {"missed": str(miss)}
                    print(name, found[name], flush=True)
                    pathlib.Path(out).write_text("{\n" + ",\n".join(f" {json.dumps(name)}: {json.dumps(row)}" for name, row in found.items()) + "\n}\n")
    missed = [f"{name}: {row['missed']}" for name, row in found.items() if "missed" in row]
    print(f"{len(missed)} of {len(found)} missed", *missed, sep="\n")
    return 1 if missed else 0


class Text(torch.nn.Module):
    def __init__(self, part):
        super().__init__()
        self.network = text_network(ROOT / "models/emoji-sdxl", part)

    def forward(self, input_ids):
        made = self.network(input_ids.long(), output_hidden_states=True)
        return made.hidden_states[-2], made.text_embeds if hasattr(made, "text_embeds") else made.pooler_output


class Decoder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.vae = vae_network(ROOT / "models/emoji-sdxl")

    def forward(self, z):
        return self.vae.decode(z, return_dict=False)[0]


def hand_made(out):
    """The operations that this project writes and the converter does not, built with MIL's own builder."""
    import coremltools as ct
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.mil import types

    @mb.program(input_specs=[mb.TensorSpec(shape=(1, 77), dtype=types.fp32)], opset_version=ct.target.iOS18)
    def program(input_ids):
        ids = mb.cast(x=input_ids, dtype="int32")
        table = np.random.randn(90, 16).astype(np.float16)
        rows = mb.gather(x=table, indices=ids, axis=0, batch_dims=0, validate_indices=False)
        highest = mb.reduce_max(x=ids, axes=[-1], keep_dims=True)
        hits = mb.cast(x=mb.equal(x=ids, y=highest), dtype="fp32")
        scores = mb.sub(x=mb.mul(x=hits, y=np.float32(77)), y=np.arange(77, dtype=np.float32))
        query = mb.reshape(x=rows, shape=[1, 2, 77, 8])
        mixed = mb.scaled_dot_product_attention(query=query, key=query, value=query, attn_mask=np.zeros((1, 1, 77, 77), np.float16))
        rows = mb.add(x=mb.reshape(x=mixed, shape=[1, 77, 16]), y=np.random.randn(77, 16).astype(np.float16))
        end = mb.reduce_argmax(x=scores, axis=-1, keep_dims=False, output_dtype="int32")
        state = mb.gather(x=rows, indices=end, axis=1, batch_dims=0, validate_indices=False)
        wide = mb.cast(x=state, dtype="fp32")
        matrix = mb.constexpr_cast(source_val=np.random.randn(16, 16).astype(np.float16), output_dtype="fp32")
        kernel = mb.constexpr_cast(source_val=np.random.randn(16, 16, 3, 3).astype(np.float16), output_dtype="fp32")
        bias = np.random.randn(16).astype(np.float32)
        wide = mb.reshape(x=mb.linear(x=wide, weight=matrix, bias=bias), shape=[1, 16, 1, 1])
        made = mb.conv(x=wide, weight=kernel, bias=bias, strides=[1, 1], pad_type="custom", pad=[1, 1, 1, 1], dilations=[1, 1], groups=1)
        return mb.identity(x=made, name="made")

    model = ct.convert(program, minimum_deployment_target=ct.target.iOS18, compute_precision=ct.precision.FLOAT32, skip_model_load=True)
    model.save(str(out))


def operations(out):
    import coremltools as ct

    torch.manual_seed(0)
    found = {}
    kinds = [
        (Text("text_encoder"), "input_ids", (1, 77), ["hidden_embeds", "pooled_outputs"], ct.precision.FLOAT16),
        (Text("text_encoder_2"), "input_ids", (1, 77), ["hidden_embeds", "pooled_outputs"], ct.precision.FLOAT16),
        (Decoder(), "z", (1, 4, 16, 16), ["image"], ct.precision.FLOAT32),
        (Decoder(), "z", (1, 4, 16, 16), ["image"], ct.precision.FLOAT16),
    ]
    with tempfile.TemporaryDirectory() as folder:
        packages = [pathlib.Path(folder) / f"{i}.mlpackage" for i in range(len(kinds) + 1)]
        for (module, name, shape, outputs, precision), package in zip(kinds, packages):
            traced = torch.jit.trace(module.eval(), torch.zeros(shape), check_trace=False)
            model = ct.convert(
                traced, inputs=[ct.TensorType(name=name, shape=shape, dtype=np.float32)],
                outputs=[ct.TensorType(name=name, dtype=np.float32) for name in outputs], compute_precision=precision,
                minimum_deployment_target=ct.target.iOS18, skip_model_load=True,
            )  # fmt: skip
            model.save(str(package))
        hand_made(packages[-1])
        for package in packages:
            for kind, parameters in patterns(package).items():
                found.setdefault(kind, set()).update(parameters)
    rows = {kind: sorted(" ".join(map(str, row)).strip() for row in parameters) for kind, parameters in found.items()}
    pathlib.Path(out).write_text(json.dumps(rows, indent=1, sort_keys=True) + "\n")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("package", nargs="?")
    parser.add_argument("--part", choices=PARTS)
    parser.add_argument("--model", type=pathlib.Path)
    parser.add_argument("--container", type=pathlib.Path)
    parser.add_argument("--all", nargs=2, metavar=("SDXL-SQUEEZE", "OUT"))
    parser.add_argument("--operations", metavar="OUT")
    args = parser.parse_args()
    if args.all:
        return check_all(pathlib.Path(args.all[0]).resolve(), args.all[1])
    if args.operations:
        operations(args.operations)
    else:
        print(json.dumps(check(args.package, args.part, args.model, args.container), indent=1))


if __name__ == "__main__":
    sys.exit(main())
