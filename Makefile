# make demo   draw a picture with the bundled model
# make test   run the tests
# make lint   formatting, clippy, docs
# Each sets up what it needs: libtorch is found, or installed into .libtorch/ once.

CARGO ?= cargo

.PHONY: all demo test lint bench setup clean

all: setup
	$(CARGO) build --release

setup:
	@sh scripts/libtorch.sh

demo: all
	mkdir -p out
	target/release/sdxl-squeeze generate --model models/emoji-sdxl --prompt "a picture of a cat face!" \
		--seed 231 --guidance 4 -o out/cat.png

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
