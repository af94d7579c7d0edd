#!/usr/bin/env bash
# Learned and ETF classifier and switchable whitening, several trainings each, on the offline suite: 400 icon names to nine
# other tasks; then the geometry of their features and regression on random features of them.
#
#     examples/transfer/run.sh OUT     # needs the extra [offline], npm and apt; SEEDS="0" takes an hour on 2 CPU cores
#
# The frame varies with the training seed; in the results kept here it was that of seed 0 throughout.
#
# OUT/compared, OUT/geometry and OUT/random-features then hold a report.md each. Continues where it was stopped.
set -euo pipefail
out=$1
mkdir -p "$out"
timm-etf data build offline --root "$out/data"

models=() one=()
for seed in ${SEEDS:-0 1 2}; do
    for model in resnet10t resnet10t_etf resnet10t_sw; do
        run="$out/$model-s$seed"
        [ -e "$run/export" ] || timm-etf pretrain --model "$model" --data-dir "$out/data/icons-400" --out "$run" \
            $([ -e "$run/run.json" ] && echo --resume) \
            --model-kwargs "channels=(32, 64, 128, 512)" stem_width=16 --img-size 40 --crop-pct 1.0 --scale 0.6 1.0 --hflip 0.0 \
            --epochs 8 --warmup-epochs 1 --batch-size 64 --lr 0.2 --weight-decay 5e-4 --workers 0 --seed "$seed"
        case $model in *_etf) label=etf ;; *_sw) label=sw ;; *) label=learned ;; esac
        models+=("$label=local-dir:$run/export")
        [ "$seed" != 0 ] || one+=("$label=local-dir:$run/export")
    done
done
# The first label is the reference.
timm-etf transfer --models "${models[@]}" --targets offline --data-root "$out/data" --seeds 1 --out "$out/compared"
features="$out/compared/features"
timm-etf geometry --models "${models[@]}" --data "$out/data/icons-400,test=validation" icons-novel kanji --data-root "$out/data" \
    --features "$features" --out "$out/geometry"
timm-etf random-features --models "${one[@]}" --data kanji animal-mnist --data-root "$out/data" \
    --features "$features" --out "$out/random-features"
