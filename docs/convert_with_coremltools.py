"""Converts what `sdxl-squeeze export FILE --to coremltools` wrote to a Core ML package, with coremltools.

    sdxl-squeeze export unet.squeezed.safetensors --to coremltools --out unet.coremltools.safetensors
    python convert_with_coremltools.py unet.coremltools.safetensors unet.mlpackage [LATENT_HEIGHT LATENT_WIDTH]

For those who want to go on in Python: to change the model before it is converted, or to use a newer coremltools. `--to coreml` writes the
package itself, in seconds and without Python. This takes about five bytes of memory for each parameter on top of the model in fp32: 25 GB
for SDXL. Tried with coremltools 9.0, torch 2.11, diffusers 0.42.1 and numpy 2.3.5 (with numpy 2.4, coremltools 9.0 fails).
"""

import json
import sys

import coremltools as ct
import numpy as np
import torch
from diffusers import UNet2DConditionModel
from safetensors import safe_open

BATCH, TOKENS = 2, 77


def load(path):
    """diffusers' UNet in fp32 with the compressed weights, and coremltools' buffers on the layers that they belong to."""
    with safe_open(path, "pt") as file:
        unet = UNet2DConditionModel.from_config(json.loads(file.metadata()["unet_config"])).eval()
        for name in file.keys():
            tensor = file.get_tensor(name)
            tensor = tensor.float() if tensor.is_floating_point() else tensor
            if "_COREML_/" in name:
                module, _, buffer = name.rpartition("_COREML_/")
                unet.get_submodule(module.rstrip(".")).register_buffer("_COREML_/" + buffer, tensor)
            else:
                unet.get_parameter(name).data = tensor
    return unet


class Wrapped(torch.nn.Module):
    def __init__(self, unet):
        super().__init__()
        self.unet = unet

    def forward(self, sample, timestep, encoder_hidden_states, time_ids, text_embeds):
        added = {"time_ids": time_ids, "text_embeds": text_embeds}
        return self.unet(sample, timestep, encoder_hidden_states, added_cond_kwargs=added, return_dict=False)[0]


def in_fp16(op):
    """Everything but the sinusoids of timestep and sizes, whose angles are off by up to a quarter in fp16."""
    trigonometric = lambda op: op is not None and op.op_type in ("sin", "cos")
    given = [value for value in op.inputs.values() if hasattr(value, "op")]
    children = [child for output in op.outputs for child in output.child_ops]
    return not (trigonometric(op) or any(trigonometric(value.op) for value in given) or any(map(trigonometric, children)))


def main(source, target, height=None, width=None):
    unet = load(source)
    config = unet.config
    height, width = int(height or config.sample_size), int(width or height or config.sample_size)
    # The refiner is told 5 numbers; its pooled text is as wide as its text states.
    numbers = 5 if config.projection_class_embeddings_input_dim - 5 * config.addition_time_embed_dim == config.cross_attention_dim else 6
    inputs = {
        "sample": torch.randn(BATCH, config.in_channels, height, width),
        "timestep": torch.full((BATCH,), 500.0),
        "encoder_hidden_states": torch.randn(BATCH, TOKENS, config.cross_attention_dim),
        "time_ids": torch.ones(BATCH, numbers),
        "text_embeds": torch.randn(BATCH, config.projection_class_embeddings_input_dim - numbers * config.addition_time_embed_dim),
    }
    traced = torch.jit.trace(Wrapped(unet).eval(), tuple(inputs.values()), check_trace=False)
    single = ("timestep", "time_ids")
    model = ct.convert(
        traced,
        inputs=[ct.TensorType(name=n, shape=x.shape, dtype=np.float32 if n in single else np.float16) for n, x in inputs.items()],
        outputs=[ct.TensorType(name="noise_pred", dtype=np.float32)],
        compute_precision=ct.transform.FP16ComputePrecision(op_selector=in_fp16),
        minimum_deployment_target=ct.target.iOS18,
        skip_model_load=True,
    )
    model.save(target)


if __name__ == "__main__":
    main(*sys.argv[1:])
