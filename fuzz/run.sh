#!/bin/sh
# Runs every target, or those that are named, on RUNS inputs each (a million by default), one after the other:
#   fuzz/run.sh
#   RUNS=10000 fuzz/run.sh container yaml
# It needs `cargo install cargo-fuzz`, and libtorch as for the product. A fault is left in fuzz/artifacts/, with the command that repeats it.
set -eu
cd "$(dirname "$0")"
targets=${*:-"safetensors container package yaml samples prompts config_json single_file lora"}
: "${RUNS:=1000000}"
: "${LIBTORCH:=$(cd .. && pwd)/.libtorch/current}"
export LIBTORCH
# On a stable compiler: no address sanitizer, but coverage, debug assertions and checks of overflow.
export RUSTC_BOOTSTRAP=1
# The readers' own threads would only take the processor from one another.
export RAYON_NUM_THREADS=1 OMP_NUM_THREADS=1
python3 seeds.py
status=0
for target in $targets; do
    mkdir -p "corpus/$target" artifacts
    cargo fuzz run --sanitizer none "$target" -- -runs="$RUNS" -timeout=10 -rss_limit_mb=2048 -max_len=20000 -print_final_stats=1 \
        > "artifacts/$target.log" 2>&1 || { status=1; echo "$target: a fault, see fuzz/artifacts/$target.log"; }
    grep -E "^Done|stat::number_of_executed_units|stat::peak_rss_mb|cov: " "artifacts/$target.log" | tail -n 4 || true
done
exit $status
