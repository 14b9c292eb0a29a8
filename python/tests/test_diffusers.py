"""`load_unet` against the dense model that diffusers loads."""

import pickle

import pytest
import torch
from conftest import ROOT, read_halves
from diffusers import UNet2DConditionModel
from tiny_unet import CONFIG

import sdxl_squeeze
from sdxl_squeeze.diffusers import load_unet, resident_bytes
from sdxl_squeeze.packed_layers import PackedConv2d, PackedLayer, PackedLinear


def inputs(dtype):
    random = torch.Generator().manual_seed(5)
    normal = lambda *shape: torch.randn(shape, generator=random).to(dtype)
    added = {"text_embeds": normal(2, 4), "time_ids": torch.zeros(2, 6, dtype=dtype)}
    return {"sample": normal(2, 4, 8, 8), "timestep": 500, "encoder_hidden_states": normal(2, 5, 8), "added_cond_kwargs": added}


def dense(decoded, dtype):
    unet = UNet2DConditionModel.from_config(CONFIG)
    unet.load_state_dict({name: torch.from_numpy(values.copy()) for name, values in read_halves(decoded).items()})
    return unet.to(dtype).eval()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_and_results_are_those_of_the_dense_model_to_the_last_bit(squeezed_unet, dtype):
    container, decoded = squeezed_unet
    unet, expected = load_unet(container, dtype=dtype), dense(decoded, dtype)
    ours, theirs = unet.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == dtype and torch.equal(ours[name], tensor), name
    assert torch.equal(unet(**inputs(dtype)).sample, expected(**inputs(dtype)).sample)


def test_compressed_layers_keep_the_bytes_of_the_file(squeezed_unet):
    container, _ = squeezed_unet
    unet = load_unet(container)
    packed = [module for module in unet.modules() if isinstance(module, PackedLayer)]
    assert any(isinstance(module, PackedConv2d) for module in packed) and any(isinstance(module, PackedLinear) for module in packed)
    with sdxl_squeeze.container.Container.open(container) as file:
        assert len(packed) == len(file.weights)
        stored = file._file.data_length
    assert resident_bytes(unet) == stored
    assert not any(parameter.requires_grad for parameter in unet.parameters()) and not unet.training


def test_the_dtype_can_be_changed_later(squeezed_unet):
    container, _ = squeezed_unet
    late, early = load_unet(container).to(torch.float32), load_unet(container, dtype=torch.float32)
    for name, tensor in early.state_dict().items():
        assert torch.equal(tensor, late.state_dict()[name]), name


def test_save_pretrained_writes_the_dense_model(squeezed_unet, tmp_path):
    container, decoded = squeezed_unet
    load_unet(container).save_pretrained(tmp_path)
    saved = UNet2DConditionModel.from_pretrained(tmp_path, torch_dtype=torch.float16)
    expected = dense(decoded, torch.float16).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in saved.state_dict().items())


def test_gradients_reach_the_inputs(squeezed_unet):
    unet = load_unet(squeezed_unet[0], dtype=torch.float32)
    given = inputs(torch.float32)
    given["sample"].requires_grad_()
    unet(**given).sample.sum().backward()
    assert given["sample"].grad.abs().sum() > 0


@pytest.mark.parametrize(
    "name, words",
    [
        ("config_is_not_a_unet", "AutoencoderKL"),
        ("config_of_millions_of_layers", "far more blocks than the file has tensors"),
    ],
)
def test_a_config_that_lies_is_refused_before_a_model_is_made(name, words):
    with pytest.raises(sdxl_squeeze.ContainerError, match=words) as refusal:
        load_unet(ROOT / f"tests/attacks/container/{name}.safetensors")
    assert pickle.loads(pickle.dumps(refusal.value)).problem == refusal.value.problem


def test_a_container_with_other_tensors_than_its_config_is_refused():
    with pytest.raises(sdxl_squeeze.ContainerError, match="the file has .*, the UNet of its config"):
        load_unet(ROOT / "tests/golden/container/unet.squeezed.safetensors")
