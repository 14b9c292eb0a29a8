# make demo   compress the bundled model, compare the results, leave pictures and a report in out/
# make test   run the tests
# make lint   formatting, clippy, docs
# Each sets up what it needs: libtorch is found, or installed into .libtorch/ once.

CARGO ?= cargo
SQUEEZE = target/release/sdxl-squeeze
# The tutorial's recipe at three sizes and ours at one: within three minutes on two slow cores.
DEMO = $(foreach bytes,4bit s40-4bit s50-4bit,configs/emoji/tutorial-$(bytes)-gs16.yaml) configs/emoji/squeeze-s40-4bit-gs16.yaml

.PHONY: all demo test lint bench setup clean

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

test: setup
	$(CARGO) test

lint: setup
	$(CARGO) fmt --check
	$(CARGO) clippy --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --no-deps

bench: setup
	$(CARGO) bench

clean:
	$(CARGO) clean
	rm -rf out
