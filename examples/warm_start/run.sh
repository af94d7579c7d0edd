#!/usr/bin/env bash
# What a ready backbone is worth under three classifiers: an ordinary learned classifier for five epochs, and from there
# four more under the simplex nearest to it, under a random one, and as it is. Ten minutes on 2 CPU cores with the demo's icons.
#
#     examples/warm_start/run.sh DATA/pictograms OUT   # DATA as of timm-etf data build embedded --root DATA
#     examples/warm_start/run.sh DATA/icons-400 OUT    # DATA as of timm-etf data build offline --root DATA
#
# It continues where it was stopped. Options behind are pretraining's; SEEDS="0 1 2" are its trainings, TIMM_ETF is the
# command that trains.
set -euo pipefail
here=$(dirname "$0")
data=$1 out=$2
shared=(--data-dir "$data" --img-size 40 --crop-pct 1.0 --scale 0.6 1.0 --hflip 0 --batch-size 64
    --workers 0 "${@:3}")

train() { # NAME OPTIONS...: a run, unless it is complete
    name=$1 resume=()
    shift
    [ ! -e "$out/$name/run.json" ] || resume=(--resume)
    [ -e "$out/$name/results.json" ] || ${TIMM_ETF:-timm-etf} pretrain "$@" "${shared[@]}" --out "$out/$name" "${resume[@]}"
}

for seed in ${SEEDS:-0 1 2}; do
    train "base-$seed" --model resnet10t --epochs 5 --warmup-epochs 1 --lr 0.2 --seed "$seed"
    tuned=(--init "local-dir:$out/base-$seed/export" --epochs 4 --warmup-epochs 0 --lr 0.02 --seed "$seed")
    train "nearest-$seed" --model resnet10t_etf --keep-classifier "${tuned[@]}"
    train "random-$seed" --model resnet10t_etf "${tuned[@]}"
    train "learned-$seed" --model resnet10t --keep-classifier "${tuned[@]}"
done
[ -n "${SEEDS:-}" ] || python "$here/draw.py" "$out"
