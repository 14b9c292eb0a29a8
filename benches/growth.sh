#!/bin/sh
# How time and memory of compressing grow with the samples, with carries in memory and in files, and with the latents' size.
#
#     benches/growth.sh MODEL_DIR [MEMORY_BUDGET]
#
# Calibration runs are made before and not counted. With the small budget carries wait in files.
set -eu
model=$1
small=${2:-600MiB}
squeeze=${SQUEEZE:-target/release/sdxl-squeeze}
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
record() { # pixels count
    "$squeeze" -q compress --config configs/tutorial-s40-4bit-gs16.yaml --model "$model" --prompts calibration/emoji.txt --steps 50 --guidance 4 \
        --height "$1" --width "$1" --calibration-nsamples "$2" --out "$out/record" --samples-out "$out/samples-$1.safetensors" > /dev/null 2>&1
}
run() { # pixels count more...
    pixels=$1 count=$2
    shift 2
    "$squeeze" -q compress --config configs/tutorial-s40-4bit-gs16.yaml --model "$model" --samples "$out/samples-$pixels.safetensors" \
        --calibration-nsamples "$count" --out "$out/run" "$@" 2> /dev/null | tail -1 | sed 's/.*), //'
}
base=${PIXELS:-64}
record "$base" 128
for count in 16 32 64 128; do
    echo "$count samples: $(run "$base" "$count"); at most $small: $(run "$base" "$count" --memory-budget "$small")"
done
for pixels in "$base" $((base * 3 / 2)) $((base * 2)); do
    [ "$pixels" = "$base" ] || record "$pixels" 16
    echo "$pixels x $pixels pixels, 16 samples: $(run "$pixels" 16)"
done
