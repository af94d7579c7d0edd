#!/usr/bin/env bash
# What a narrow classifier costs: 248 pictogram classes on 128 and 64 features, learned and fixed, one seed each.
#
#     examples/narrow_heads/run.sh OUT     # needs the extra [demo]; about six minutes on 2 CPU cores
#
# OUT/results.json then holds each run's validation accuracy.
set -euo pipefail
out=$1
mkdir "$out"
timm-etf data build embedded --root "$out/data"

run() { # NAME MODEL WIDTH [CLASSIFIER ARGUMENTS]: the demo's recipe on a resnet10t of another width
    timm-etf pretrain --model "$2" --data-dir "$out/data/pictograms" --out "$out/$1" \
        --img-size 40 --in-chans 1 --mean 0.5 --std 0.5 --crop-pct 1.0 --scale 0.6 1.0 --hflip 0 \
        --epochs 14 --warmup-epochs 2 --batch-size 64 --lr 0.2 --weight-decay 5e-4 --workers 0 \
        --model-kwargs "channels=(32, 64, 128, $3)" stem_width=16 "${@:4}"
}
run 128-learned resnet10t 128
run 128-orthoplex resnet10t_etf 128
run 64-learned resnet10t 64
run 64-spherical_code resnet10t_etf 64
run 64-gaussian resnet10t_etf 64 frame=gaussian
run 64-simplex-behind-mlp resnet10t_etf 64 projector=mlp

python - "$out" <<'PYTHON'
import json, sys
from pathlib import Path

runs = sorted(Path(sys.argv[1]).glob("*/results.json"))
results = {run.parent.name: json.loads(run.read_text())["source"] for run in runs}
(Path(sys.argv[1]) / "results.json").write_text(json.dumps(results, indent=2) + "\n")
for name, source in results.items():
    print(f"{name:24} top-1 {source['top1']:.1f} %, top-5 {source['top5']:.1f} %")
PYTHON
