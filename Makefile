# make demo   compress the bundled model, compare the results; pictures and a report are left in out/
# make test   run the tests
# make lint   check formatting, clippy and docs
# make wheel  build the Python wheel, with the program and the package that reads containers, into target/wheels/
# make wheel TARGET=aarch64-unknown-linux-gnu (or aarch64-apple-darwin)   the wheel for another machine: see scripts/cross.sh
# make test-wheel, make test-python   install the wheel in many ways and run it; test the Python package
# make deny   check licences and sources of the dependencies (needs cargo-deny)
# Each installs libtorch into .libtorch/ first, unless it is found.

CARGO ?= cargo
SQUEEZE = target/release/sdxl-squeeze
# The tutorial's recipe at three sizes and this project's at one: within three minutes on two slow cores.
OURS = configs/emoji/squeeze-s40-4bit-gs16.yaml
DEMO = $(foreach size,4bit s40-4bit s50-4bit,configs/emoji/tutorial-$(size)-gs16.yaml) $(OURS)
JUDGED = --model models/emoji-sdxl --judge calibration/emoji-judge.txt --out out/demo
DRAW = $(SQUEEZE) generate --model models/emoji-sdxl --prompt "a picture of a cat face!" --seed 231 --guidance 4 --overwrite

PYTHON ?= python3
# Environments of Python: what packs the wheel, and what the tests of the package import.
TOOLS = target/python/tools
TESTS = target/python/tests
# What sets a compilation for another machine, TARGET, and fetches the libtorch of that machine.
CROSS = $(if $(TARGET),PYTHON="$(abspath $(TOOLS))/bin/python" sh scripts/cross.sh $(TARGET))
# The folder of packages that libtorch's torch lies in.
SITE = $$(dirname "$$(readlink -f .libtorch/current)")

.PHONY: all demo test lint deny bench wheel test-wheel test-python setup clean

all: setup
	$(CARGO) build --release

setup:
	@sh scripts/libtorch.sh

# The first compressed picture is there before the comparison begins.
demo: all
	mkdir -p out
	$(DRAW) -o out/cat.png
	$(SQUEEZE) compare $(OURS) --containers-only $(JUDGED)
	$(DRAW) --unet out/demo/squeeze-s40-4bit-gs16.squeezed.safetensors -o out/cat-squeezed.png
	$(SQUEEZE) compare $(DEMO) $(JUDGED)

# INSTA_UPDATE=no: a text that differs from its snapshot fails, and no file is written.
test: setup
	INSTA_UPDATE=no $(CARGO) test --locked --workspace

# Clippy and rustdoc share the metadata of the dependencies, which are not compiled to machine code for them.
lint: setup
	$(CARGO) fmt --all --check
	$(CARGO) clippy --locked --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --locked --workspace --no-deps

deny:
	$(CARGO) deny check

wheel: $(if $(TARGET),,setup) $(TOOLS)
	rm -rf target/wheels
	$(if $(findstring darwin,$(TARGET)),$(TOOLS)/bin/pip install --quiet ziglang)
	$(CROSS) $(TOOLS)/bin/python -m build --wheel --outdir target/wheels python
	$(TOOLS)/bin/twine check --strict target/wheels/*.whl

test-wheel: wheel
	$(TOOLS)/bin/python tests/wheel/check.py target/wheels/*.whl --torch "$(SITE)" --python "$$(command -v $(PYTHON))" --paths --demo

test-python: setup $(TESTS)
	cd python && ../$(TESTS)/bin/mypy && ../$(TESTS)/bin/python -m pytest

$(TOOLS):
	$(PYTHON) -m venv $@
	$@/bin/pip install --quiet build twine

# torch is not installed a second time: a .pth file names where it is.
$(TESTS): | setup
	$(PYTHON) -m venv $@
	$@/bin/pip install --quiet numpy diffusers==0.42.1 pytest mypy
	echo "$(SITE)" > "$$($@/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torch.pth"

bench: setup
	$(CARGO) bench

clean:
	$(CARGO) clean
	rm -rf out
