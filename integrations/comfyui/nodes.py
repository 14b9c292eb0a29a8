"""The node. ComfyUI's modules are imported when the node is used, so that this file can be read without ComfyUI."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sdxl_squeeze.container import Container

from .names import ldm_names

# The folder of ComfyUI's models that the node lists.
FOLDER = "diffusion_models"
# CosXL's sigmas, which ComfyUI reads from the checkpoint.
COSXL = {"edm_vpred.sigma_max": 120.0, "edm_vpred.sigma_min": 0.002}


class SqueezedUNetLoader:
    """Loads `*.squeezed.safetensors` from ComfyUI's `models/diffusion_models`.

    The weights are decoded to fp16 when they are loaded: in ComfyUI the model takes the memory of the dense one.
    """

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "load"
    CATEGORY = "loaders/sdxl-squeeze"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """The file, and whether a v-prediction model was trained to end in pure noise, which containers do not say."""
        import folder_paths

        files = [name for name in folder_paths.get_filename_list(FOLDER) if name.endswith(".squeezed.safetensors")]
        return {"required": {"container": (files,), "zero_terminal_snr": ("BOOLEAN", {"default": False})}}

    def load(self, container: str, zero_terminal_snr: bool = False) -> tuple[Any]:
        """The MODEL of the file `container`."""
        import comfy.sd
        import folder_paths

        path = folder_paths.get_full_path_or_raise(FOLDER, container)
        model = comfy.sd.load_diffusion_model_state_dict(state_dict(path, zero_terminal_snr))
        if model is None:
            raise RuntimeError(f"{path}: ComfyUI knows no model with the UNet of this file")
        return (model,)


def state_dict(path: str, zero_terminal_snr: bool = False) -> dict[str, Tensor]:
    """The decoded tensors of the container `path` under the names of single-file checkpoints, with the markers by which
    ComfyUI knows what the UNet predicts (`SDXL.model_type` in `comfy/supported_models.py`).

    Raises `sdxl_squeeze.ContainerError` if the file is damaged, `ValueError` if it is of another network, or of a
    prediction that has no marker.
    """
    with Container.open(path) as container:
        if container.network != "unet":
            raise ValueError(f"{path}: is a {container.network}, where a UNet is needed")
        markers = markers_of(path, container.prediction_type, zero_terminal_snr)
        names = ldm_names(container.shapes())
        return {stored: container.tensor(name) for name, stored in names.items()} | markers


def markers_of(path: str, prediction_type: str | None, zero_terminal_snr: bool) -> dict[str, Tensor]:
    """The tensors that mark the prediction. A container that does not say what it predicts is taken for epsilon."""
    if prediction_type in (None, "epsilon"):
        return {}
    if prediction_type == "v_prediction":
        names = ["v_pred", "ztsnr"] if zero_terminal_snr else ["v_pred"]
        return {name: torch.empty(0) for name in names}
    if prediction_type == "edm_v_prediction":
        return {name: torch.tensor(value) for name, value in COSXL.items()}
    # Playground's marker has the mean and deviation of its latents, which are the VAE's and not in the UNet's file.
    raise ValueError(
        f"{path}: its UNet predicts `{prediction_type}`, which a UNet alone cannot tell ComfyUI; "
        "write a whole checkpoint with `sdxl-squeeze export --to single-file`"
    )


NODE_CLASS_MAPPINGS = {"SqueezedUNetLoader": SqueezedUNetLoader}
NODE_DISPLAY_NAME_MAPPINGS = {"SqueezedUNetLoader": "Load compressed UNet (sdxl-squeeze)"}
