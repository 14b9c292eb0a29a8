#!/bin/sh
# Finds libtorch 2.11.0, or installs it once, and leaves a link to it at .libtorch/current, where .cargo/config.toml looks.
#
# In this order: $LIBTORCH; the torch of $PYTHON (python3), if it is that release; PyPI's wheel, into .libtorch/site.
set -eu

version=2.11.0
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}

usable() { [ -n "$1" ] && [ -d "$1/include" ] && ls "$1"/lib/libtorch_cpu.* >/dev/null 2>&1; }

# The version is read from a file: importing torch takes seconds.
of_python() {
    PYTHONPATH=${1:-} "$python" - "$version" <<'PYTHON'
import importlib.util, pathlib, re, sys
spec = importlib.util.find_spec("torch")
if spec and spec.origin:
    folder = pathlib.Path(spec.origin).parent
    text = (folder / "version.py").read_text() if (folder / "version.py").exists() else ""
    if re.search(r"__version__ = '" + re.escape(sys.argv[1]) + r"\b", text):
        print(folder)
PYTHON
}

mkdir -p .libtorch
if [ -n "${LIBTORCH:-}" ]; then
    if ! usable "$LIBTORCH"; then
        echo "libtorch.sh: LIBTORCH=$LIBTORCH has no include/ and lib/libtorch_cpu" >&2
        exit 1
    fi
    # Without links in its path: LIBTORCH may be .libtorch/current, which must not link to itself.
    torch=$(cd "$LIBTORCH" && pwd -P)
elif torch=$(of_python) && usable "$torch"; then
    :
elif torch=$(of_python "$PWD/.libtorch/site") && usable "$torch"; then
    :
else
    echo "libtorch.sh: installing torch $version into .libtorch/site (2 to 3 GB to fetch, a few minutes)" >&2
    rm -rf .libtorch/partial .libtorch/site
    "$python" -m pip install --quiet --no-cache-dir --no-warn-script-location --target .libtorch/partial "torch==$version" >&2
    mv .libtorch/partial .libtorch/site
    torch=$(of_python "$PWD/.libtorch/site")
    if ! usable "$torch"; then
        echo "libtorch.sh: pip installed torch $version, but it has no libtorch in it" >&2
        exit 1
    fi
fi

# Only a real change touches the link: cargo would build torch-sys again.
if [ "$(readlink .libtorch/current 2>/dev/null || true)" != "$torch" ]; then
    ln -sfn "$torch" .libtorch/current
    echo "libtorch.sh: using $torch" >&2
fi
