#!/usr/bin/env bash
# A published checkpoint of the icons, VARIANT.icons400, and everything on its card: resnet10t_etf takes half an hour on
# 2 CPU cores, resnet50_etf two hours.
#
#     examples/icons400/run.sh OUT [resnet10t|resnet50]   # needs the extra [offline], npm and apt; continues where it was stopped
#
# OUT/VARIANT.icons400 then holds the files that hub_cards/ and timm_etf/published/ carry.
set -euo pipefail
here=$(dirname "$0")
out=$1
base=${2:-resnet10t}
case $base in
    resnet10t)
        recipe=(--epochs 10 --lr 0.2)
        compared=(--targets offline --protocols probe knn fewshot)
        ;;
    resnet50) # without fashion-mnist's 70,000 images and the probe of 2,048 features, which take too long on two cores
        recipe=(--epochs 6 --lr 0.1)
        compared=(--targets icons-novel kanji armenian emoji-subcategory emoji-identity animal-mnist mnist-5k hiragana)
        compared+=(--protocols knn fewshot)
        ;;
    *) echo "no recipe for $base: resnet10t or resnet50" >&2; exit 2 ;;
esac
mkdir -p "$out"
timm-etf data build offline --root "$out/data"
for model in "${base}_etf" "$base"; do
    run="$out/$model"
    resume=()
    [ ! -e "$run/run.json" ] || resume=(--resume)
    [ -e "$run/export" ] || timm-etf pretrain --model "$model" --data-dir "$out/data/icons-400" --out "$run" "${resume[@]}" \
        --img-size 40 --crop-pct 1.0 --scale 0.6 1.0 --hflip 0.0 --warmup-epochs 1 "${recipe[@]}" \
        --batch-size 64 --weight-decay 5e-4 --workers 0 --seed 0
    python "$here/halve.py" "$run" "$out/half/$model" --images "$out/data/icons-400/validation"
done
timm-etf transfer --models "learned=local-dir:$out/half/$base/export" "etf=local-dir:$out/half/${base}_etf/export" \
    "${compared[@]}" --data-root "$out/data" --seeds 1 --out "$out/compared-$base"
python "$here/card.py" "$out/half/${base}_etf" "$out/compared-$base/results.json" "$out/${base}_etf.icons400"
python - "$out/results.json" "$out/${base}_etf" "$out/$base" << 'PYTHON'
import json, sys
from pathlib import Path

results, *runs = map(Path, sys.argv[1:])
known = json.loads(results.read_text()) if results.exists() else {}
known |= {run.name: json.loads((run / "results.json").read_text())["source"] for run in runs}
results.write_text(json.dumps(known, indent=2) + "\n")
PYTHON
