#!/bin/sh
# Measures how time and memory of `compress` grow with the number of samples and with the size of the
# latents.
#
#     benches/growth.sh MODEL_DIR [MEMORY_BUDGET]
#
# Samples are recorded first, and the time for that is not counted. Carries are kept in memory, and with
# the small MEMORY_BUDGET in files.
set -eu
model=$1
small=${2:-600MiB}
squeeze=${SQUEEZE:-target/release/sdxl-squeeze}
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
record() { # pixels count
    "$squeeze" -q --overwrite compress --config configs/tutorial-s40-4bit-gs16.yaml --model "$model" --prompts calibration/emoji.txt --steps 50 --guidance 4 \
        --height "$1" --width "$1" --calibration-nsamples "$2" --out "$out/record" --samples-out "$out/samples-$1.safetensors" > /dev/null 2>&1
}
run() { # pixels count more...
    pixels=$1 count=$2
    shift 2
    "$squeeze" -q --overwrite compress --config configs/tutorial-s40-4bit-gs16.yaml --model "$model" --samples "$out/samples-$pixels.safetensors" \
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
