#!/usr/bin/env bash
# Convert three real ImageNet checkpoints and measure what is left of their answers, half an hour on 2 CPU cores.
#
#     examples/convert/run.sh DATA OUT   # DATA as of timm-etf data build offline --root DATA; needs the extra [in1k] and apt
set -euo pipefail
here=$(dirname "$0")
data=$1 out=$2

python "$here/prepare.py" --data-root "$data" --out "$out"
for size in 0 1 2; do
    timm-etf convert "local-dir:$out/lite$size" --images "$out/images" --img-size 128 --epochs 1 --out "$out/conv$size"
done
python "$here/measure.py" "$out"
