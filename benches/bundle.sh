#!/bin/sh
# Sizes, time and memory of whole bundles for Apple's Swift pipeline at full size, with made-up weights.
#
#   benches/bundle.sh PROGRAM OUT [STEP ...]
#
# PROGRAM is `sdxl-squeeze`, OUT a folder. Steps: synth (SDXL base as one file, so that the tokenizers are CLIP's),
# unet (50 % pruned, 4 bits), networks (text encoders and VAE in 8, 6 and 4 bits), bundles (each of these and fp16),
# parts (each package alone, by `export`), and joint (the first text encoder by the joint solver); all of them in this
# order if none is given. Bytes do not depend on the solver: only the last step calibrates.
# OUT/times.tsv has seconds, processor seconds and peak resident memory of each command, OUT/bytes.tsv the bytes of
# each package. It takes 13 GB in OUT; a bundle is deleted once its bytes are counted.
set -eu

program=$1
out=$2
shift 2
[ $# -gt 0 ] || set -- synth unet networks bundles parts joint
mkdir -p "$out"
model=$out/sdxl.safetensors
# The size and the layout of Apple's own bundle for iOS.
size="--height 768 --width 768 --layout split-einsum"

# measure NAME COMMAND...: its seconds, its processor seconds and its peak resident memory.
measure() {
    name=$1
    shift
    /usr/bin/time -o "$out/$name.time" -f '%e s	%U + %S s	%M KiB' "$@" >"$out/$name.log" 2>&1 || {
        tail -5 "$out/$name.log" >&2
        exit 1
    }
    printf '%s\t%s\n' "$name" "$(cat "$out/$name.time")" | tee -a "$out/times.tsv"
}

# The bytes of the files in a folder.
bytes() {
    find "$1" -type f -printf '%s\n' | awk '{ sum += $1 } END { printf "%.0f", sum }'
}

# networks_config BITS FILE MORE: palettes for all networks beside the UNet, without calibration.
networks_config() {
    settings="global_config: {n_bits: $1, granularity: per_grouped_channel, group_size: 16}"
    printf 'solver: sequential\ntext_encoders:\n  on_misfit: smaller_group\n  %s\nvae:\n  on_misfit: smaller_group\n  %s\n' \
        "$settings" "$settings" >"$2"
    # As in configs/squeeze-text-vae.yaml, the ends of the decoder stay fp16.
    printf "  module_name_configs: {'decoder\\\\.conv_in': null, 'decoder\\\\.conv_out': null}\n" >>"$2"
}

# containers BITS: the flags that name the containers of the networks in BITS bits; none for 16.
containers() {
    [ "$1" = 16 ] && return
    folder=$out/networks-$1
    printf '%s ' --text-encoder "$folder/text_encoder.squeezed.safetensors" \
        --text-encoder-2 "$folder/text_encoder_2.squeezed.safetensors" --vae "$folder/vae.squeezed.safetensors"
}

for step in "$@"; do
    case $step in
    synth)
        measure synth "$program" synth --preset sdxl-base --single-file --out "$model"
        ;;
    unet)
        measure unet "$program" compress --progress none --config configs/magnitude-s40-4bit-gs16.yaml --target-sparsity 0.5 \
            --model "$model" --out "$out/unet"
        ;;
    networks)
        for bits in 8 6 4; do
            networks_config "$bits" "$out/networks-$bits.yaml"
            measure "networks-$bits" "$program" compress --progress none --config "$out/networks-$bits.yaml" --model "$model" \
                --out "$out/networks-$bits"
        done
        ;;
    bundles)
        for bits in 16 8 6 4; do
            rm -rf "${out:?}/bundle"
            # shellcheck disable=SC2046,SC2086
            measure "bundle-$bits" "$program" bundle --progress none --model "$model" --unet "$out/unet/unet.squeezed.safetensors" \
                $(containers $bits) $size --vae-encoder --out "$out/bundle"
            for file in "$out"/bundle/*; do
                printf '%s\t%s\t%s\n' "$bits" "$(basename "$file")" "$(bytes "$file")" | tee -a "$out/bytes.tsv"
            done
            printf '%s\t%s\t%s\n' "$bits" all "$(bytes "$out/bundle")" | tee -a "$out/bytes.tsv"
            rm -rf "${out:?}/bundle"
        done
        ;;
    parts)
        for bits in 16 6; do
            for part in text_encoder text_encoder_2 vae_decoder vae_encoder; do
                rm -rf "$out/part.mlpackage"
                case $part in
                vae_*) of="--height 768 --width 768" ;;
                *) of= ;;
                esac
                # shellcheck disable=SC2046,SC2086
                measure "export-$part-$bits" "$program" export --progress none "$model" --to coreml --part $part $(containers $bits) $of \
                    --out "$out/part.mlpackage"
                measure "verify-$part-$bits" "$program" verify "$out/part.mlpackage"
                rm -rf "$out/part.mlpackage"
            done
        done
        ;;
    joint)
        # The second encoder's layers stay fp16.
        {
            printf 'calibration: {prompts: calibration/varied.txt, captions: calibration/captions.txt}\n'
            printf 'solver: joint\nsequencing: sublayer\ntext_encoders:\n  nsamples: 256\n  on_misfit: smaller_group\n'
            printf "  module_name_configs: {'text_encoder_2\\\\..*': null}\n"
            printf '  global_config: {n_bits: 6, granularity: per_grouped_channel, group_size: 16}\n'
        } >"$out/joint.yaml"
        measure joint "$program" compress --progress none --config "$out/joint.yaml" --model "$model" --out "$out/joint"
        ;;
    *)
        echo "unknown step: $step" >&2
        exit 2
        ;;
    esac
done
