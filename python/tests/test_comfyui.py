"""The ComfyUI node, with stand-ins for ComfyUI's modules."""

import importlib.util
import json
import sys
from types import ModuleType

import pytest
import torch
from conftest import GOLDEN, ROOT

import sdxl_squeeze


@pytest.fixture(scope="module")
def node():
    """The folder as ComfyUI imports it (`load_custom_node` in `nodes.py`): from its path, and without ComfyUI here."""
    folder = ROOT / "integrations/comfyui"
    spec = importlib.util.spec_from_file_location("squeezed_node", folder / "__init__.py", submodule_search_locations=[str(folder)])
    module = importlib.util.module_from_spec(spec)
    sys.modules["squeezed_node"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def comfy(monkeypatch, squeezed_unet):
    """ComfyUI's two modules; the result is a dict whose `model` the loader returns, and where it leaves the state dict."""
    held = {"model": object()}

    def load(state_dict):
        held["state_dict"] = state_dict
        return held["model"]

    package, sd, paths = ModuleType("comfy"), ModuleType("comfy.sd"), ModuleType("folder_paths")
    package.sd, sd.load_diffusion_model_state_dict = sd, load
    paths.get_filename_list = lambda folder: ["a.safetensors", "unet.squeezed.safetensors"] if folder == "diffusion_models" else []
    paths.get_full_path_or_raise = lambda folder, name: str(squeezed_unet[0].parent / name)
    for name, module in (("comfy", package), ("comfy.sd", sd), ("folder_paths", paths)):
        monkeypatch.setitem(sys.modules, name, module)
    return held


@pytest.mark.parametrize("name", ["base-like", "refiner-like", "emoji-sdxl"])
def test_names_are_those_that_diffusers_reads_from_single_files(node, name):
    stored = json.loads((GOLDEN / f"single-file/{name}.json").read_text())["tensors"]
    prefix = "model.diffusion_model."
    expected = {of["of"][0].removeprefix("unet/"): key.removeprefix(prefix) for key, of in stored.items() if key.startswith(prefix)}
    assert len(expected) > 100
    assert sys.modules["squeezed_node.names"].ldm_names(expected) == expected


def test_a_tensor_of_no_known_module_is_refused(node):
    with pytest.raises(ValueError, match="controlnet.weight"):
        sys.modules["squeezed_node.names"].ldm_names(["conv_in.weight", "controlnet.weight"])


def test_the_node_gives_comfyui_the_decoded_tensors(node, comfy, squeezed_unet):
    loader = node.NODE_CLASS_MAPPINGS["SqueezedUNetLoader"]
    assert loader.INPUT_TYPES()["required"]["container"] == (["unet.squeezed.safetensors"],)
    assert loader().load("unet.squeezed.safetensors") == (comfy["model"],)
    given, tensors = comfy["state_dict"], sdxl_squeeze.load(squeezed_unet[0])
    assert len(given) == len(tensors) and all(tensor.dtype == torch.float16 for tensor in given.values())
    assert torch.equal(given["input_blocks.0.0.weight"], tensors["conv_in.weight"])


def test_a_unet_that_comfyui_does_not_know_is_an_error(node, comfy):
    comfy["model"] = None
    with pytest.raises(RuntimeError, match="knows no model"):
        node.NODE_CLASS_MAPPINGS["SqueezedUNetLoader"]().load("unet.squeezed.safetensors")


@pytest.mark.parametrize(
    "prediction, ends, expected",
    [
        (None, False, {}),
        ("epsilon", True, {}),
        ("v_prediction", False, {"v_pred"}),
        ("v_prediction", True, {"v_pred", "ztsnr"}),
        ("edm_v_prediction", False, {"edm_vpred.sigma_max", "edm_vpred.sigma_min"}),
    ],
)
def test_the_prediction_is_marked_as_comfyui_reads_it(node, prediction, ends, expected):
    assert sys.modules["squeezed_node.nodes"].markers_of("x", prediction, ends).keys() == set(expected)


@pytest.mark.parametrize("prediction", ["sample", "edm_epsilon"])
def test_a_prediction_without_a_marker_is_refused(node, prediction):
    with pytest.raises(ValueError, match="export --to single-file"):
        sys.modules["squeezed_node.nodes"].markers_of("x", prediction, False)
