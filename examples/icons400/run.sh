#!/usr/bin/env bash
# The published checkpoint resnet10t_etf.icons400 and everything on its card; half an hour on 2 CPU cores.
#
#     examples/icons400/run.sh OUT     # needs the extra [offline], npm and apt; continues where it was stopped
#
# OUT/resnet10t_etf.icons400 then holds the files that hub_cards/ and timm_etf/published/ carry.
set -euo pipefail
here=$(dirname "$0")
out=$1
mkdir -p "$out"
timm-etf data build offline --root "$out/data"
for model in resnet10t_etf resnet10t; do
    run="$out/$model"
    [ -e "$run/export" ] || timm-etf pretrain --model "$model" --data-dir "$out/data/icons-400" --out "$run" \
        $([ -e "$run/run.json" ] && echo --resume) \
        --img-size 40 --crop-pct 1.0 --scale 0.6 1.0 --hflip 0.0 --epochs 10 --warmup-epochs 1 \
        --batch-size 64 --lr 0.2 --weight-decay 5e-4 --workers 0 --seed 0
    python "$here/halve.py" "$run" "$out/half/$model" --images "$out/data/icons-400/validation"
done
timm-etf transfer --models "learned=local-dir:$out/half/resnet10t/export" "etf=local-dir:$out/half/resnet10t_etf/export" \
    --targets offline --protocols probe knn fewshot --data-root "$out/data" --seeds 1 --out "$out/compared"
python "$here/card.py" "$out/half/resnet10t_etf" "$out/compared/results.json" "$out/resnet10t_etf.icons400"
