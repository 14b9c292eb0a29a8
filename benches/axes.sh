#!/bin/sh
# Compares palettes along output channels (channel_axis: 0) and along input channels (channel_axis: 1), by the
# joint and by the sequential solver, at 4, 3 and 2 bits on the bundled model.
#
#     benches/axes.sh [OUT]
set -eu
squeeze=${SQUEEZE:-target/release/sdxl-squeeze}
out=${1:-$(mktemp -d)}
mkdir -p "$out"
configs=
for bits in 4 3 2; do
    for axis in 0 1; do
        for solver in sequential joint; do
            config=$out/$bits-bits-axis-$axis-$solver.yaml
            configs="$configs $config"
            cat > "$config" << END
model: {path: emoji-sdxl}
calibration: {prompts: calibration/emoji-varied.txt, calibration_nsamples: 384, steps: 30, guidance: 4.0}
solver: $solver
palettize:
  on_misfit: dense
  global_config: {n_bits: $bits, granularity: per_grouped_channel, group_size: 16, channel_axis: $axis}
END
        done
    done
done
# shellcheck disable=SC2086
"$squeeze" compare $configs --judge calibration/emoji-judge.txt --no-noise-floor --out "$out/compared"
