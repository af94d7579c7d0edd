"""Peak memory of extracting features from 15,000 and from 60,000 images, each in a process of its own.

python tests/benchmarks/extraction_memory.py
"""

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image

from timm_etf.transfer import Target, extract, open_splits


def measure(root: Path, count: int) -> None:
    splits = open_splits(Target("noise", str(root)))
    torch.manual_seed(0)
    overlay = {"input_size": (3, 32, 32)}
    model = timm.create_model("test_resnet", num_classes=0, pretrained_cfg_overlay=overlay)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        extract(model, splits.train, Path(folder), workers=0)
        size = sum(p.stat().st_size for p in Path(folder).rglob("*.safetensors")) / 1e6
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"{count} images: peak {peak:.0f} MiB, {seconds:.0f} s, {count / seconds:.0f} img/s, {size:.0f} MB of features"
    )


def main() -> None:
    if len(sys.argv) > 1:
        return measure(Path(sys.argv[1]), int(sys.argv[2]))
    rng = np.random.default_rng(0)
    for count in (15_000, 60_000):
        with tempfile.TemporaryDirectory() as name:
            root = Path(name)
            for k in range(10):
                (root / "train" / str(k)).mkdir(parents=True)
                for i in range(count // 10):
                    Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(root / f"train/{k}/{i}.png")
            (root / "test").symlink_to(root / "train")
            subprocess.run([sys.executable, __file__, str(root), str(count)], check=True)


if __name__ == "__main__":
    main()
