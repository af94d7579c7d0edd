"""Images per second and peak memory of `timm-etf pretrain` beside timm's own train.py, on the same images.

    python -m tests.benchmarks.throughput --train-py train.py

train.py is that of https://github.com/huggingface/pytorch-image-models, for the installed timm. Both train the same
model on the same drawn JPEGs with the same batch size, augmentation, optimizer and schedule in float32, with two loader
workers, alternately. The rate is that of the second epoch's training; memory is the largest sum of the proportional set
sizes of a run's processes. A fixed head is given to train.py by importing this package first.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import timm
from PIL import Image

CASES: dict[str, dict[str, Any]] = {
    "resnet18": {"img_size": 64, "stored": 96, "classes": 20, "images": 2048, "batch_size": 64},
    "resnet50": {"img_size": 224, "stored": 256, "classes": 8, "images": 96, "batch_size": 8},
}
"""Image side in training and in the files, classes, training images, batch."""

WITH_ETF = "import runpy, sys, timm_etf; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"


def draw(root: Path, classes: int, images: int, stored: int) -> Path:
    """Image folder of smooth random fields with some grain, which compress about as photographs do."""
    rng = np.random.default_rng(0)
    for split, count in (("train", images), ("validation", 2 * classes)):
        for i in range(count):
            folder = root / split / f"class{i % classes}"
            folder.mkdir(parents=True, exist_ok=True)
            coarse = Image.fromarray(rng.integers(0, 256, (stored // 8, stored // 8, 3), dtype=np.uint8))
            smooth = np.asarray(coarse.resize((stored, stored), Image.Resampling.BICUBIC), dtype=np.int16)
            pixels = np.clip(smooth + rng.integers(-12, 13, smooth.shape), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.jpg", quality=90)
    return root


def ours(model: str, data: Path, out: Path, case: dict[str, Any]) -> tuple[list[object], Any]:
    """The command, and what finds its rate in images per second once it has run."""
    command = [sys.executable, "-m", "timm_etf", "pretrain", "--model", model, "--data-dir", data, "--out", out]
    command += ["--img-size", case["img_size"], "--batch-size", case["batch_size"], "--epochs", 2]
    command += ["--warmup-epochs", 0, "--lr", 0.05, "--workers", 2]
    return command, lambda: json.loads((out / "log.jsonl").read_text().splitlines()[-1])["images_per_second"]


def timms(train_py: Path, model: str, data: Path, out: Path, case: dict[str, Any]) -> tuple[list[object], Any]:
    """The same of timm's train.py."""
    about = timm.data.resolve_data_config({}, model=timm.create_model(model.removesuffix("_etf"), num_classes=2))
    command = [sys.executable, "-c", WITH_ETF, train_py, "--model", model, "--data-dir", data, "--output", out]
    command += [
        "--img-size",
        case["img_size"],
        "-b",
        case["batch_size"],
        "--epochs",
        2,
        "--num-classes",
        case["classes"],
    ]
    command += ["--warmup-epochs", 0, "--lr", 0.05, "-j", 2, "--device", "cpu", "--log-interval", 1]
    command += ["--opt", "sgd", "--weight-decay", 5e-5, "--sched", "cosine", "--sched-on-updates", "--smoothing", 0.1]
    command += ["--train-interpolation", about["interpolation"]]

    def rate() -> float:
        text = (out.parent / f"{out.name}.log").read_text()
        return float(re.findall(r"Train: 1 .*?\([0-9.]+s, +([0-9.]+)/s\)", text)[-1])

    return command, rate


def measure(command: list[object], log: Path) -> float:
    """Run a command; returns the peak memory of its processes in MiB."""
    peak, ended = [0.0], threading.Event()
    with log.open("w") as file:
        process = subprocess.Popen([str(c) for c in command], stdout=file, stderr=subprocess.STDOUT)

        def watch() -> None:
            while not ended.wait(0.5):
                peak[0] = max(peak[0], sum(map(_pss, _tree(process.pid))))

        watcher = threading.Thread(target=watch)
        watcher.start()
        status = process.wait()
        ended.set()
        watcher.join()
    if status:
        raise SystemExit(f"{' '.join(map(str, command))}\n{log.read_text()[-3000:]}")
    return peak[0]


def _tree(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid, *(grandchild for child in children for grandchild in _tree(int(child)))]


def _pss(pid: int) -> float:
    try:
        return int(re.search(r"^Pss:\s+(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.M)[1]) / 1024  # type: ignore[index]
    except (OSError, TypeError):
        return 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train-py", type=Path, required=True)
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=CASES)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--images", type=int, help="training images, for a shorter look than a case's own number")
    options = parser.parse_args()
    print(
        "| model, pixels | images/s, timm | images/s, ours | ratio | peak MiB, timm | ours |\n|---|---|---|---|---|---|"
    )
    for name in options.cases:
        case = CASES[name] | ({"images": options.images} if options.images else {})
        with tempfile.TemporaryDirectory() as folder:
            data = draw(Path(folder) / "data", case["classes"], case["images"], case["stored"])
            for model in (name, f"{name}_etf"):
                print(row(model, data, Path(folder), case, options), flush=True)


def row(model: str, data: Path, folder: Path, case: dict[str, Any], options: argparse.Namespace) -> str:
    """Measure one model `options.repeats` times on both sides; a row of the table, medians with ranges."""
    rates: dict[str, list[float]] = {"timm": [], "ours": []}
    memory: dict[str, list[float]] = {"timm": [], "ours": []}
    for number in range(options.repeats):
        for side in ("timm", "ours") if number % 2 == 0 else ("ours", "timm"):
            out = folder / f"{model}-{side}-{number}-{time.monotonic_ns()}"
            command, rate = (
                ours(model, data, out, case) if side == "ours" else timms(options.train_py, model, data, out, case)
            )
            memory[side].append(measure(command, folder / f"{out.name}.log"))
            rates[side].append(rate())
    ratios = sorted(o / t for o, t in zip(rates["ours"], rates["timm"], strict=True))
    cells = [f"{statistics.median(rates[s]):.1f} ({min(rates[s]):.1f} to {max(rates[s]):.1f})" for s in rates]
    cells.append(f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")
    cells += [f"{statistics.median(memory[s]):.0f}" for s in memory]
    return f"| {model}, {case['img_size']} | {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
