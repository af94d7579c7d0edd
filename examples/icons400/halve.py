"""Store a run's model as float16, and measure what that leaves of its accuracy."""

import argparse
import json
import shutil
from pathlib import Path

import timm
import torch

import timm_etf
from timm_etf import hub

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("run", type=Path)
parser.add_argument("out", type=Path)
parser.add_argument("--images", type=Path, required=True, help="validation images, a folder per class")
arguments = parser.parse_args()

export = arguments.run / "export"
config = json.loads((export / "config.json").read_text())
results = json.loads((export / "results.json").read_text())
about = {
    "tag": "icons400",
    "label_names": config["label_names"],
    "recipe": config.get("etf", {}).get("recipe"),
    "half": True,
    "overwrite": True,
}
folder = arguments.out / "export"
hub.export(timm_etf.create_model(f"local-dir:{export}", pretrained=True), folder, results=results, **about)

# What timm's own validation does: the model as it is stored, with the preprocessing that it names.
model = timm_etf.create_model(f"local-dir:{folder}", pretrained=True).eval()
dataset = timm.data.create_dataset(
    "folder", str(arguments.images), class_map={n: i for i, n in enumerate(config["label_names"])}
)
loader = timm.data.create_loader(
    dataset, batch_size=128, use_prefetcher=False, **timm.data.resolve_data_config(model=model), num_workers=0
)
with torch.inference_mode():
    hits = sum((model(images).argmax(1) == labels).sum().item() for images, labels in loader)
results["source"]["stored_top1"] = 100 * hits / len(dataset)
print(f"top-1 {results['source']['top1']:.2f} % in training, {results['source']['stored_top1']:.2f} % as stored")
hub.export(model, folder, results=results, **about)
for name in ("log.jsonl", "run.json", "DATA_LICENSES.md"):
    shutil.copy(arguments.run / name, arguments.out)
