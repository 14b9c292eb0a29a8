"""Installs a wheel in every way that people have and runs it: `make test-wheel`.

    python3 check.py WHEEL --torch SITE [--python PYTHON ...] [--paths] [--demo] [--download]

SITE is a folder of packages with torch 2.11.0, which most environments here get as links instead of 2 GB each; `--download`
has pip fetch torch from PyPI once. Each `--python` gets a virtual environment. `--demo` compresses the bundled model from an
empty folder, with the configs and prompts that are in the program. `--paths` looks for folders of this machine in a program that
was compiled here. A wheel for another machine is only looked into: its files, and what the loader there will read.
"""

import argparse
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile

import binaries

ROOT = pathlib.Path(__file__).resolve().parents[2]
WANTED = "2.11.0"
# All that a program may be linked to: torch's libraries, and those of every system of its kind.
LIBRARIES = {
    "linux": r"lib(torch|torch_cpu|c10)\.so|lib(c|m|dl|rt|pthread|gcc_s|stdc\+\+)\.so\.\d|ld-linux-.*",
    "macosx": r"@rpath/lib(torch|torch_cpu|c10)\.dylib|/usr/lib/lib(System\.B|c\+\+\.1|iconv\.2)\.dylib",
}
ORIGIN = {"linux": "$ORIGIN", "macosx": "@loader_path"}
BLANK = ("PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "LIBTORCH")


def run(command, code=0, **environment):
    """The output of `command`, which must end with exit code `code`."""
    kept = {name: value for name, value in os.environ.items() if name not in BLANK}
    done = subprocess.run(
        [str(part) for part in command], env=kept | environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if done.returncode != code:
        sys.exit(f"{command}: exit code {done.returncode}, not {code}\n{done.stdout}")
    return done.stdout


def expect(text, *words):
    for word in words:
        if word not in text:
            sys.exit(f"`{word}` is not in:\n{text}")


def site_of(python, **environment):
    return pathlib.Path(run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], **environment).strip())


def venv(python, folder):
    run([python, "-m", "venv", "--without-pip", folder])
    return folder / "bin/python"


def install(python, wheel, *options, **environment):
    """Installs the wheel alone, by the pip that belongs to this script's Python."""
    pip = [sys.executable, "-m", "pip", "--python", python, "--quiet", "install", "--no-deps"]
    run([*pip, *options, wheel], **environment)


def link_torch(site, torch):
    """Links the packages of `torch` (torch, its dependencies, their metadata) into `site`."""
    for package in torch.iterdir():
        if package.name not in ("bin", "__pycache__") and not (site / package.name).exists():
            (site / package.name).symlink_to(package)


def starts(command, **environment):
    """The command says its version: libtorch was found and loaded."""
    expect(run([*command, "--version"], **environment), "sdxl-squeeze ")


def fake_torch(site, version):
    (site / "torch/lib").mkdir(parents=True)
    (site / "torch/__init__.py").write_text("raise SystemExit('the launcher must not import torch')\n")
    (site / "torch/version.py").write_text(f"__version__ = '{version}'\n" if version else "")


def contents(folder, _python, wheel, _torch):
    """The program may be executed and finds libtorch beside its package; every licence in the metadata is there."""
    with zipfile.ZipFile(wheel) as files:
        names = files.namelist()
        (program,) = (entry for entry in files.infolist() if entry.filename.endswith("/bin/sdxl-squeeze"))
        if program.external_attr >> 16 & 0o111 != 0o111:
            sys.exit("the program may not be executed")
        starts_as_tagged(wheel, binaries.read(files.read(program)))
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        licences = metadata.replace("METADATA", "licenses/")
        listed = re.findall(r"^License-File: (.+)$", files.read(metadata).decode(), re.MULTILINE)
        if sorted(licences + name for name in listed) != sorted(name for name in names if name.startswith(licences) and name != licences):
            sys.exit(f"the licences in the metadata are {listed}")
        crates = files.read(f"{licences}LICENSES-crates.txt").decode()
        expect(crates, "torch-sys 0.24", "safetensors 0.", "faer 0.24", "Permission is hereby granted")


def tags(wheel):
    """System and machine in the tag of a wheel, such as `linux` and `aarch64`, and the oldest release of the system."""
    found = re.search(r"-(?:many)?(linux|macosx)_(\d+_\d+_)?(\w+)\.whl$", wheel.name)
    if not found:
        sys.exit(f"{wheel.name} has the tag of no system")
    return found[1], found[3], (found[2] or "").strip("_").replace("_", ".")


def starts_as_tagged(wheel, program):
    """The program is one for the machine of the tag, and finds all libraries there, libtorch beside its package."""
    system, machine, oldest = tags(wheel)
    if (program.system, program.machine) != (system, machine):
        sys.exit(f"the program is one for {program.system} on {program.machine}, and the wheel's tag is another")
    if program.folders != [f"{ORIGIN[system]}/../../torch/lib"]:
        sys.exit(f"the program has another rpath: {program.folders}")
    if others := [library for library in program.libraries if not re.fullmatch(LIBRARIES[system], library)]:
        sys.exit(f"the program is linked to {others}")
    if not any("libtorch_cpu" in library for library in program.libraries):
        sys.exit("the program is not linked to libtorch")
    if system == "macosx" and (program.oldest != oldest or not program.is_signed):
        sys.exit(f"the program is for macOS {program.oldest} and later, signed: {program.is_signed}")


def is_of_this_machine(wheel):
    system = {"Linux": "linux", "Darwin": "macosx"}.get(platform.system())
    return tags(wheel)[:2] == (system, platform.machine())


def no_paths(_folder, _python, wheel, _torch):
    """The program names no folder of this machine."""
    with zipfile.ZipFile(wheel) as files:
        (name,) = (name for name in files.namelist() if name.endswith("/bin/sdxl-squeeze"))
        program = files.read(name)
    for path in (str(ROOT), str(pathlib.Path.home() / ".cargo"), ".libtorch/"):
        if path.encode() in program:
            at = program.index(path.encode())
            sys.exit(f"the program names {program[at : at + 120]}")


def virtual_environment(folder, python, wheel, torch):
    inner = venv(python, folder / "env")
    install(inner, wheel)
    site = site_of(inner)
    link_torch(site, torch)
    starts([folder / "env/bin/sdxl-squeeze"])
    starts([inner, "-m", "sdxl_squeeze"])
    # The program finds libtorch by itself: it may be started without the launcher.
    starts([site / "sdxl_squeeze/bin/sdxl-squeeze"])
    # A moved environment: rpaths are relative, and the Python of a venv is not.
    (folder / "env").rename(folder / "moved")
    starts([folder / "moved/bin/python", "-m", "sdxl_squeeze"])


def torch_elsewhere(folder, python, wheel, torch):
    """torch is in another folder of the search path, as under `--system-site-packages`."""
    inner = venv(python, folder / "env")
    install(inner, wheel)
    (site_of(inner) / "elsewhere.pth").write_text(f"{torch}\n")
    starts([folder / "env/bin/sdxl-squeeze"])
    starts([folder / "env/bin/sdxl-squeeze"], LD_LIBRARY_PATH="/nowhere")


def conda(folder, python, wheel, torch):
    """conda's layout: a prefix with a Python of its own in bin and its packages in lib, and no pyvenv.cfg."""
    named = "import sys, os; print(sys.base_prefix, f'python{sys.version_info[0]}.{sys.version_info[1]}')"
    base, name = run([python, "-c", named]).split()
    (folder / "bin").mkdir()
    shutil.copy(f"{base}/bin/{name}", folder / "bin/python")
    library = folder / "lib" / name
    (library / "site-packages").mkdir(parents=True)
    for entry in pathlib.Path(base, "lib", name).iterdir():
        if entry.name != "site-packages":
            (library / entry.name).symlink_to(entry)
    link_torch(library / "site-packages", torch)
    inner = folder / "bin/python"
    if site_of(inner) != library / "site-packages":
        sys.exit(f"{inner} has its packages in {site_of(inner)}")
    install(inner, wheel)
    starts([folder / "bin/sdxl-squeeze"])
    starts([library / "site-packages/sdxl_squeeze/bin/sdxl-squeeze"])


def user_install(folder, python, wheel, torch):
    install(python, wheel, "--user", "--break-system-packages", PYTHONUSERBASE=str(folder))
    (site,) = folder.glob("lib/python*/site-packages")
    link_torch(site, torch)
    starts([folder / "bin/sdxl-squeeze"], PYTHONUSERBASE=str(folder))
    starts([site / "sdxl_squeeze/bin/sdxl-squeeze"])


def debian(folder, python, wheel, torch):
    """Debian's layout: dist-packages, as pip installs there with --target."""
    site = folder / "dist-packages"
    install(python, wheel, "--target", site)
    link_torch(site, torch)
    starts([site / "sdxl_squeeze/bin/sdxl-squeeze"])
    starts([python, "-m", "sdxl_squeeze"], PYTHONPATH=str(site))


def refusals(folder, python, wheel, _torch):
    """No torch, another release, torch without its version, torch without its libraries: a line with the remedy."""
    inner = venv(python, folder / "env")
    install(inner, wheel)
    command, remedy = [folder / "env/bin/sdxl-squeeze", "--version"], f"-m pip install torch=={WANTED}`"
    site = site_of(inner)

    def refused(*words):
        said = run(command, code=1)
        expect(said, "sdxl-squeeze: ", remedy, *words)
        if said.count("\n") != 1:
            sys.exit(f"more than one line:\n{said}")

    refused("torch is not installed in this Python")
    for version, words in (("2.10.0+cpu", "is torch 2.10.0+cpu"), ("2.11.01", "is torch 2.11.01"), ("", "does not say")):
        fake_torch(site, version)
        refused(words)
        shutil.rmtree(site / "torch")
    fake_torch(site, WANTED)
    refused("has no libtorch_cpu")
    # What is not the launcher's: a program that is gone.
    (site / "torch/lib/libtorch_cpu.so").touch()
    (site / "sdxl_squeeze/bin/sdxl-squeeze").unlink()
    expect(run(command, code=1), "cannot start", "install the wheel of sdxl-squeeze again")


def real_install(folder, python, wheel, _torch):
    """As a user does it: pip fetches torch and all that it needs."""
    inner = venv(python, folder / "env")
    pip = [sys.executable, "-m", "pip", "--python", inner]
    print(run([*pip, "install", "--no-cache-dir", wheel]).splitlines()[-1])
    starts([folder / "env/bin/sdxl-squeeze"])
    expect(run([*pip, "check"]), "No broken requirements")


def demo(folder, python, wheel, torch):
    """From an empty folder: compress, verify, export, compare, all by names of what the program has in it."""
    inner = venv(python, folder / "env")
    install(inner, wheel)
    link_torch(site_of(inner), torch)
    empty = folder / "empty"
    empty.mkdir()
    os.chdir(empty)
    squeeze = folder / "env/bin/sdxl-squeeze"
    config, model, judge = "configs/emoji/tutorial-s40-4bit-gs16.yaml", "models/emoji-sdxl", "judge.txt"
    # Few prompts: the installation is tested, not the compression.
    (empty / judge).write_text("a picture of a cat face\na picture of a rocket\n")
    few = ["--calibration-nsamples", "8", "--steps", "4"]
    run([squeeze, "compress", "--config", config, "--model", model, *few, "--out", "one"])
    run([squeeze, "verify", "one/unet.squeezed.safetensors"])
    run([squeeze, "export", "one/unet.squeezed.safetensors", "--to", "diffusers", "--model", model, "--out", "folder"])
    print(run([squeeze, "compare", config, "--model", model, "--judge", judge, *few, "--out", "two"]), end="")
    check = (
        "import sdxl_squeeze, torch\n"
        "tensors = sdxl_squeeze.load('one/unet.squeezed.safetensors')\n"
        "assert all(tensor.dtype == torch.float16 for tensor in tensors.values())\n"
        "print(len(tensors), 'tensors')\n"
    )
    expect(run([inner, "-c", check]), "tensors")


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("wheel", type=pathlib.Path)
    arguments.add_argument("--torch", type=pathlib.Path, required=True)
    arguments.add_argument("--python", action="append")
    arguments.add_argument("--paths", action="store_true")
    arguments.add_argument("--demo", action="store_true")
    arguments.add_argument("--download", action="store_true")
    given = arguments.parse_args()
    wheel, torch = given.wheel.resolve(), given.torch.resolve()
    pythons = given.python or [sys.executable]
    cases = [(contents, pythons[0])] + [(no_paths, pythons[0])] * given.paths
    if not is_of_this_machine(wheel):
        if given.download or given.demo:
            print("not done: --download and --demo would run the program, which is one for another machine")
        return check(cases, wheel, torch)
    cases += [(virtual_environment, python) for python in pythons]
    cases += [(case, pythons[0]) for case in (torch_elsewhere, conda, user_install, debian, refusals)]
    cases += [(real_install, pythons[0])] * given.download + [(demo, pythons[0])] * given.demo
    check(cases, wheel, torch)


def check(cases, wheel, torch):
    """Does each case with its Python, in a folder of its own."""
    for case, python in cases:
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            case(pathlib.Path(folder).resolve(), python, wheel, torch)
            os.chdir(ROOT)
        version = run([python, "--version"]).strip()
        print(f"ok: {case.__name__.replace('_', ' ')} ({version}), {time.monotonic() - began:.1f} s", flush=True)


if __name__ == "__main__":
    main()
