#!/bin/sh
# Writes full-size Core ML packages with made-up weights in fp16, runs `verify` on each, and prints bytes,
# seconds and peak memory.
#
#     benches/coreml.sh [MODEL_DIR]
#
# Without MODEL_DIR, `synth` makes SDXL base (7 GB). The packages need 6 GB more at a time, and are removed.
set -eu
squeeze=${SQUEEZE:-target/release/sdxl-squeeze}
out=$(mktemp -d "${TMPDIR:-/tmp}/coreml.XXXXXX")
trap 'rm -rf "$out"' EXIT
measured() { # name command...
    name=$1
    shift
    /usr/bin/time -f "%e s, %M KiB" -o "$out/time" "$@" > "$out/said"
    echo "$name: $(tail -1 "$out/time")"
}
if [ $# -gt 0 ]; then
    model=$1
else
    model=$out/model
    measured "synth sdxl-base" "$squeeze" -q synth --preset sdxl-base --out "$model"
fi
written() { # name options...
    name=$1
    shift
    measured "export $name" "$squeeze" export "$model" --to coreml --io apple "$@" -q
    for package in $(find "$out/packages" -name '*.mlpackage' | sort); do
        bytes=$(find "$package" -type f -exec stat -c %s {} + | awk '{ sum += $1 } END { printf "%.0f", sum }')
        echo "    $(basename "$package"): $bytes bytes, weight.bin $(stat -c %s "$package/Data/com.apple.CoreML/weights/weight.bin")"
        measured "    verify" "$squeeze" verify "$package"
        echo "        $(sed -n '1s/.*: whole/whole/p; 2p' "$out/said" | paste -sd ' ')"
    done
    rm -rf "$out/packages"
    mkdir "$out/packages"
}
mkdir "$out/packages"
for layout in linear split-einsum; do
    written "$layout, whole" --layout "$layout" --height 1024 --out "$out/packages/whole.mlpackage"
    written "$layout, --chunks 2" --layout "$layout" --height 1024 --chunks 2 --out "$out/packages/chunks"
    written "$layout, six functions" --layout "$layout" --height 512,768,1024 --batch 2,1 --out "$out/packages/functions.mlpackage"
    written "$layout, --chunks 2, six functions" --layout "$layout" --height 512,768,1024 --batch 2,1 --chunks 2 --out "$out/packages/both"
done
