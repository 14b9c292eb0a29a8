"""The launcher finds torch without importing it, and says what is wrong with it in one line."""

import importlib.util
import os
from types import SimpleNamespace

import pytest

from sdxl_squeeze import launcher


@pytest.fixture
def torch_of(tmp_path, monkeypatch):
    """A folder that the launcher takes for torch's."""

    def make(version, libraries=True):
        folder = tmp_path / "torch"
        (folder / "lib").mkdir(parents=True)
        if libraries:
            (folder / "lib/libtorch_cpu.so").touch()
        if version is not None:
            (folder / "version.py").write_text(f"from typing import Optional\n__version__ = '{version}'\n")
        found = SimpleNamespace(origin=str(folder / "__init__.py"))
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: found if name == "torch" else None)
        return folder

    return make


@pytest.mark.parametrize("version", ["2.11.0", "2.11.0+cpu", "2.11.0+cu130"])
def test_builds_of_the_release_for_any_device_are_taken(torch_of, version):
    folder = torch_of(version)
    assert launcher.find_libraries() == folder / "lib"


@pytest.mark.parametrize(
    "version, libraries, words",
    [
        ("2.10.0", True, "is torch 2.10.0, but the program is linked to libtorch 2.11.0"),
        ("2.11.0.dev1", True, "is torch 2.11.0.dev1"),
        (None, True, "does not say which release"),
        ("2.11.0", False, "has no libtorch_cpu"),
    ],
)
def test_another_torch_is_refused_with_the_remedy(torch_of, version, libraries, words):
    torch_of(version, libraries)
    with pytest.raises(launcher.TorchError, match=words) as refusal:
        launcher.find_libraries()
    assert "-m pip install torch==2.11.0`" in str(refusal.value)


def test_without_torch_the_command_ends_with_one_line(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as end:
        launcher.main()
    assert str(end.value).startswith("sdxl-squeeze: torch is not installed in this Python")


def test_only_a_torch_that_is_not_beside_the_package_is_named(tmp_path, monkeypatch):
    program = tmp_path / "site/sdxl_squeeze/bin/sdxl-squeeze"
    beside, elsewhere = tmp_path / "site/torch/lib", tmp_path / "elsewhere/torch/lib"
    for folder in (program.parent, beside, elsewhere):
        folder.mkdir(parents=True)
    monkeypatch.setattr(launcher, "PROGRAM", program)
    monkeypatch.setattr(launcher.sys, "platform", "linux")
    monkeypatch.setenv("LD_LIBRARY_PATH", "/before")
    assert launcher.environment_for(beside) == dict(os.environ)
    assert launcher.environment_for(elsewhere)["LD_LIBRARY_PATH"] == f"{elsewhere}:/before"
    monkeypatch.delenv("LD_LIBRARY_PATH")
    # An empty part would be the current folder.
    assert launcher.environment_for(elsewhere)["LD_LIBRARY_PATH"] == str(elsewhere)


def test_the_release_is_that_of_the_wheels_dependency():
    text = (launcher.Path(__file__).parents[1] / "pyproject.toml").read_text()
    assert f'dependencies = ["torch=={launcher.TORCH}"]' in text
