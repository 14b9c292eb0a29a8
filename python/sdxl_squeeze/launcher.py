"""Starts the program `sdxl-squeeze` with the libtorch of this Python.

The program is linked to libtorch, which comes with torch. Where torch is missing or is of another release, the system's loader
would stop the program before its first line, with the name of a library and no remedy. So the command is this launcher: it
finds torch without importing it, which would take seconds, checks its release, and becomes the program.
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from pathlib import Path
from typing import NoReturn

# The release that the program is linked to: the C++ interface of libtorch changes with each.
TORCH = "2.11.0"

PROGRAM = Path(__file__).parent / "bin" / "sdxl-squeeze"


class TorchError(Exception):
    """Why there is no libtorch for the program, with the remedy."""


def main() -> NoReturn:
    """Becomes the program, with the arguments of this process. Ends with exit code 1 if the program cannot be started."""
    try:
        libraries = find_libraries()
        environment = environment_for(libraries)
        os.execve(PROGRAM, ["sdxl-squeeze", *sys.argv[1:]], environment)
    except TorchError as why:
        sys.exit(f"sdxl-squeeze: {why}")
    except OSError as why:
        sys.exit(f"sdxl-squeeze: cannot start {PROGRAM}: {why.strerror}; install the wheel of sdxl-squeeze again")


def find_libraries() -> Path:
    """The folder of libtorch's libraries in the torch that this Python would import.

    Raises `TorchError` if there is no torch, or none of the release `TORCH`.
    """
    remedy = f"run `{sys.executable} -m pip install torch=={TORCH}`"
    spec = importlib.util.find_spec("torch")
    folder = Path(spec.origin).parent if spec and spec.origin else None
    if folder is None:
        raise TorchError(f"torch is not installed in this Python, and the program uses its libtorch: {remedy}")
    found = torch_version(folder)
    if found is None:
        raise TorchError(f"{folder} does not say which release of torch it is; {TORCH} is needed: {remedy}")
    # A build for another device, such as 2.11.0+cpu, has the same interface.
    if found.partition("+")[0] != TORCH:
        raise TorchError(f"{folder} is torch {found}, but the program is linked to libtorch {TORCH}: {remedy}")
    libraries = folder / "lib"
    if not any(libraries.glob("libtorch_cpu.*")):
        raise TorchError(f"{libraries} has no libtorch_cpu: {remedy}")
    return libraries


def torch_version(folder: Path) -> str | None:
    """What torch says its version is, read from its sources; None if it does not say."""
    try:
        text = (folder / "version.py").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    match = re.search(r"^__version__ = ['\"]([^'\"]+)['\"]", text, re.MULTILINE)
    return match[1] if match else None


def environment_for(libraries: Path) -> dict[str, str]:
    """The environment in which the program finds `libraries`.

    The program itself looks for torch beside this package. Only a torch in another folder, such as that of the system under
    a virtual environment, has to be named: the variable is inherited by all that the program starts.
    """
    environment = dict(os.environ)
    beside = PROGRAM.parents[2] / "torch" / "lib"
    if not beside.is_dir() or not beside.samefile(libraries):
        name = "DYLD_LIBRARY_PATH" if sys.platform == "darwin" else "LD_LIBRARY_PATH"
        given = environment.get(name)
        environment[name] = f"{libraries}{os.pathsep}{given}" if given else str(libraries)
    return environment
