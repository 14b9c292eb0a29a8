#!/bin/sh
# Times full-size UNet forwards, in turn by this program and by diffusers, on equal weights and inputs.
#
#     benches/forward_vs_diffusers.sh MODEL_DIR PYTHON [ROUNDS]
#
# MODEL_DIR is a pipeline such as `sdxl-squeeze synth --preset sdxl-base --out MODEL_DIR` writes. PYTHON
# has torch 2.11.0 and diffusers 0.42.1 (tests/golden/README.md). Each process makes three forwards, of
# which the first warms up, and prints a JSON line.
set -eu
model=$1 python=$2 rounds=${3:-3}
here=$(dirname "$0")
inputs=$(mktemp -d)/forward.safetensors
cargo build -q --release --example unet_forward
ours=$here/../target/release/examples/unet_forward
for _ in $(seq "$rounds"); do
    echo "diffusers $("$python" "$here/../tests/golden/make_unet_forward.py" "$model" --latent 64 --out "$inputs" --repeat 3 2>/dev/null)"
    echo "ours      $("$ours" "$model" "$inputs" --repeat 3)"
done
echo "ours, one stage in memory at a time $("$ours" "$model" "$inputs" --repeat 2 --low-memory)"
rm -r "$(dirname "$inputs")"
