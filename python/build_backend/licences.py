"""The licences of all that is compiled into the program."""

from __future__ import annotations

import json
import os
import subprocess
from collections import deque
from pathlib import Path
from typing import Any

# Of this repository: sources of others that lie in it, with their licences.
OF_FILES = {
    "LICENSE-MIT": "LICENSE-MIT",
    "LICENSE-APACHE": "LICENSE-APACHE",
    "crates/coreml/src/proto/LICENSE.txt": "LICENSE-coremltools.txt",
    "crates/model/src/text/vocabulary/LICENSE": "LICENSE-clip-vocabulary.txt",
    "src/report/font/LICENSE-DEJAVU": "LICENSE-dejavu-font.txt",
    "models/emoji-sdxl/README.md": "LICENSE-emoji-sdxl.md",
}
OF_CRATES = "LICENSES-crates.txt"
STARTS = ("license", "licence", "copying", "copyright", "notice", "unlicense")


def add(info: Path, root: Path) -> None:
    """Adds the licences to the folder `info` (`*.dist-info`) of an unpacked wheel, and lists them in its METADATA."""
    folder = info / "licenses"
    folder.mkdir(exist_ok=True)
    for source, name in OF_FILES.items():
        (folder / name).write_bytes((root / source).read_bytes())
    (folder / OF_CRATES).write_text(of_crates(root), encoding="utf-8")
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    headers, blank, text = (info / "METADATA").read_text(encoding="utf-8").partition("\n\n")
    lines = [line for line in headers.split("\n") if not line.startswith("License-File:")]
    lines += [f"License-File: {name}" for name in names]
    (info / "METADATA").write_text("\n".join(lines) + blank + text, encoding="utf-8")


def of_crates(root: Path) -> str:
    """The crates of other authors in the program: name, version, licence, source, and the texts of their licences."""
    texts: dict[str, list[str]] = {}
    lines = ["Crates that are compiled into sdxl-squeeze, each with its licence. The texts follow.", ""]
    for package in crates(root):
        name = f"{package['name']} {package['version']}"
        lines.append(f"{name}: {package['license'] or 'see its text'} ({package['repository'] or 'https://crates.io'})")
        for path in sorted(Path(package["manifest_path"]).parent.iterdir()):
            if path.is_file() and path.name.lower().startswith(STARTS):
                text = path.read_text(encoding="utf-8", errors="replace").strip()
                texts.setdefault(text, []).append(f"{name} ({path.name})")
    for text, names in texts.items():
        lines += ["", "=" * 80, *names, "=" * 80, "", text]
    return "\n".join(lines) + "\n"


def target(root: Path) -> str:
    """The triple that the program is compiled for."""
    if given := os.environ.get("CARGO_BUILD_TARGET"):
        return given
    told = subprocess.run(["rustc", "--version", "--verbose"], check=True, cwd=root, stdout=subprocess.PIPE, text=True).stdout
    return next(line.removeprefix("host: ") for line in told.splitlines() if line.startswith("host: "))


def crates(root: Path) -> list[dict[str, Any]]:
    """The packages that the program is linked with, sorted, without those of this workspace and those of the build alone."""
    command = ["cargo", "metadata", "--format-version=1", "--locked", f"--filter-platform={target(root)}"]
    found = json.loads(subprocess.run(command, check=True, cwd=root, stdout=subprocess.PIPE).stdout)
    nodes = {node["id"]: node for node in found["resolve"]["nodes"]}
    waiting = deque([found["resolve"]["root"]])
    linked = set(waiting)
    while waiting:
        for dependency in nodes[waiting.popleft()]["deps"]:
            is_linked = any(kind["kind"] is None for kind in dependency["dep_kinds"])
            if is_linked and dependency["pkg"] not in linked:
                linked.add(dependency["pkg"])
                waiting.append(dependency["pkg"])
    packages = (package for package in found["packages"] if package["id"] in linked and package["source"])
    return sorted(packages, key=lambda package: (package["name"], package["version"]))
