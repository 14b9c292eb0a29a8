#!/bin/sh
# Times whole runs on a GPU: the bundled model, and full-size SDXL with made-up weights.
#
#   benches/gpu.sh PROGRAM OUT [STEP ...]
#
# PROGRAM is `sdxl-squeeze`, OUT a folder for profiles, logs and the table `times.tsv`, which is written
# step by step. Steps: synth, bundled, tutorial, default (all of them in this order if none is given), and
# plan (the predictions for these runs), budgets (the tutorial's run, in less memory: after it, to compare bytes).
# LIMIT, in seconds, stops each compression early; its profile then has the steps so far.
# The full-size model takes 7 GB in the folder MODEL (OUT/model if not set).
set -eu

program=$1
out=$2
shift 2
[ $# -gt 0 ] || set -- synth bundled tutorial default
model=${MODEL:-$out/model}
work=${WORK:-$out/work}
mkdir -p "$out" "$work"
table=$out/times.tsv

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader | tee "$out/card.txt"
nproc >>"$out/card.txt"

# measure NAME COMMAND...: its seconds, exit code, and the GPU's mean load and most memory meanwhile.
measure() {
    name=$1
    shift
    nvidia-smi --query-gpu=utilization.gpu,memory.used --format=csv,noheader,nounits -lms 200 >"$out/$name.load" &
    watcher=$!
    before=$(date +%s.%N)
    code=0
    "$@" >"$out/$name.log" 2>&1 || code=$?
    after=$(date +%s.%N)
    kill $watcher 2>/dev/null || true
    wait $watcher 2>/dev/null || true
    awk -F, -v name="$name" -v before="$before" -v after="$after" -v code="$code" '
        { load += $1; if ($2 > most) most = $2 }
        END { printf "%s\t%.1f s\texit %d\tGPU busy %.0f %%\tGPU memory %.1f GiB\n",
              name, after - before, code, NR ? load / NR : 0, most / 1024 }' "$out/$name.load" | tee -a "$table"
}

compress() {
    name=$1
    shift
    rm -rf "${work:?}/$name"
    measure "$name" timeout --foreground -s INT "${LIMIT:-100000}" "$program" compress --device cuda:0 --progress none --profile "$out/$name.json" --out "$work/$name" "$@"
}

for step in "$@"; do
    case $step in
    synth)
        measure synth "$program" synth --preset sdxl-base --out "$model"
        ;;
    bundled)
        compress bundled --config configs/emoji/squeeze-s40-4bit-gs16.yaml --model models/emoji-sdxl
        ;;
    tutorial)
        # The tutorial's three prompts have 60 calls of the UNet; seven have the 128 that its config asks for.
        grep -v '^#' calibration/varied.txt | head -7 >"$work/seven.txt"
        compress tutorial --config configs/tutorial-s40-4bit-gs16.yaml --prompts "$work/seven.txt" --model "$model" --dtype f16 --height 512 --width 512
        ;;
    default)
        compress default --config configs/squeeze-s40-4bit-gs16.yaml --model "$model" --dtype f16 --height 512 --width 512
        ;;
    plan)
        for config in tutorial-s40-4bit-gs16 squeeze-s40-4bit-gs16; do
            "$program" plan --device cuda:0 "configs/$config.yaml" --model "$model" --dtype f16 --height 512 --width 512
        done >"$out/plan.txt"
        "$program" plan --device cuda:0 configs/emoji/squeeze-s40-4bit-gs16.yaml --model models/emoji-sdxl >>"$out/plan.txt"
        grep -E '^#|peak memory' "$out/plan.txt"
        ;;
    budgets)
        for budget in ${BUDGETS:-8GiB 12GiB}; do
            compress "tutorial-$budget" --config configs/tutorial-s40-4bit-gs16.yaml --model "$model" --dtype f16 --height 512 --width 512 \
                --memory-budget "$budget"
            cmp "$work/tutorial/unet.squeezed.safetensors" "$work/tutorial-$budget/unet.squeezed.safetensors" && echo "$budget: the same bytes"
        done
        ;;
    *)
        echo "unknown step: $step" >&2
        exit 2
        ;;
    esac
done
cat "$table"
