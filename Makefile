# make demo   compress the bundled model, compare the results; pictures and a report are left in out/
# make test   run the tests
# make lint   check formatting, clippy and docs
# make deny   check licences and sources of the dependencies (needs cargo-deny)
# Each installs libtorch into .libtorch/ first, unless it is found.

CARGO ?= cargo
SQUEEZE = target/release/sdxl-squeeze
# The tutorial's recipe at three sizes and this project's at one: within three minutes on two slow cores.
DEMO = $(foreach size,4bit s40-4bit s50-4bit,configs/emoji/tutorial-$(size)-gs16.yaml) configs/emoji/squeeze-s40-4bit-gs16.yaml

.PHONY: all demo test lint deny bench setup clean

all: setup
	$(CARGO) build --release

setup:
	@sh scripts/libtorch.sh

demo: all
	mkdir -p out
	$(SQUEEZE) generate --model models/emoji-sdxl --prompt "a picture of a cat face!" --seed 231 --guidance 4 -o out/cat.png
	$(SQUEEZE) compare $(DEMO) --model models/emoji-sdxl --judge calibration/emoji-judge.txt --out out/demo
	$(SQUEEZE) generate --model models/emoji-sdxl --unet out/demo/squeeze-s40-4bit-gs16.squeezed.safetensors \
		--prompt "a picture of a cat face!" --seed 231 --guidance 4 -o out/cat-squeezed.png

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

bench: setup
	$(CARGO) bench

clean:
	$(CARGO) clean
	rm -rf out
