"""`sdxl_squeeze.load` and `Container` against the golden files, and against files that lie."""

import pathlib
import resource
import subprocess
import sys

import pytest
from conftest import GOLDEN, ROOT, read_halves

import sdxl_squeeze
from sdxl_squeeze.bits import unpack
from sdxl_squeeze.container import Container

ATTACKS = ROOT / "tests/attacks"
# Their tensors are whole; what is wrong is the UNet that their configs describe.
OF_THE_CONFIG = ("config_is_not_a_unet", "config_of_millions_of_layers")


@pytest.mark.parametrize("name, decoded", [("unet", "decoded"), ("vectors", "vectors-decoded"), ("blocks", "blocks-decoded")])
def test_weights_of_every_kind_decode_to_the_bits_of_the_definition(name, decoded):
    tensors = sdxl_squeeze.load(GOLDEN / f"container/{name}.squeezed.safetensors")
    expected = read_halves(GOLDEN / f"container/{decoded}.safetensors")
    assert tensors.keys() == expected.keys()
    for key, tensor in tensors.items():
        assert tensor.is_contiguous() and tuple(tensor.shape) == expected[key].shape
        assert tensor.numpy().tobytes() == expected[key].tobytes(), key


def test_bits_are_packed_as_by_coremltools():
    import json

    import torch

    for case in json.loads((GOLDEN / "container/packing.json").read_text()):
        stream = torch.frombuffer(bytearray.fromhex(case["packed"]), dtype=torch.uint8)
        assert unpack(stream, case["bits"], len(case["values"])).tolist() == case["values"]


@pytest.mark.parametrize("path", sorted(ATTACKS.glob("container/*")) + sorted(ATTACKS.glob("safetensors/*")), ids=lambda path: path.stem)
def test_a_file_that_lies_is_refused_with_its_name(path):
    if path.stem in OF_THE_CONFIG:
        assert sdxl_squeeze.load(path)
        return
    with pytest.raises(sdxl_squeeze.ContainerError) as refusal:
        sdxl_squeeze.load(path)
    assert str(refusal.value).startswith(f"{path}: ") and len(str(refusal.value)) < 400 + len(str(path))


def test_a_huge_weight_without_data_takes_no_memory():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name in ("shape_huge_without_data", "shape_overflows", "group_of_2_to_63"):
        with pytest.raises(sdxl_squeeze.ContainerError):
            sdxl_squeeze.load(ATTACKS / f"container/{name}.safetensors")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10


def test_a_changed_byte_is_found_unless_verify_is_off(tmp_path):
    content = bytearray((GOLDEN / "container/unet.squeezed.safetensors").read_bytes())
    # Within the indices of some weight: another index is a valid one.
    content[-3] ^= 1
    path = tmp_path / "changed.squeezed.safetensors"
    path.write_bytes(content)
    with pytest.raises(sdxl_squeeze.ContainerError, match="data_sha256"):
        sdxl_squeeze.load(path)
    Container.open(path, verify=False).close()


def test_an_unknown_name_is_a_key_error_and_parts_are_no_tensors():
    with Container.open(GOLDEN / "container/unet.squeezed.safetensors") as container:
        for name in ("nothing", "linear_4.weight.indices"):
            with pytest.raises(KeyError):
                container.tensor(name)
        assert "linear_4.weight" in container.shapes() and "linear_4.weight.indices" not in container.shapes()
        assert container.network == "unet" and container.recipe["note"] == "Größe"


def test_importing_the_package_imports_no_torch():
    code = "import sys, sdxl_squeeze, sdxl_squeeze.launcher; sys.exit(any(name in sys.modules for name in ('torch', 'numpy')))"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=pathlib.Path(ROOT, "python"))
