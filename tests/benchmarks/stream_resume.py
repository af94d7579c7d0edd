"""Seconds to a batch near the end of a stream's epoch: entered there, as a resume does, and with all batches before it.

    python -m tests.benchmarks.stream_resume

16 shards of 500 drawn JPEGs of 256 pixels, augmented to 224, in batches of 8; a loader is made anew for every cell.
Shuffle buffers are left as timm has them, so that each worker holds most of what it reads.
"""

import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import timm
import webdataset

from tests.benchmarks.throughput import draw
from timm_etf.pretrain.config import PretrainConfig
from timm_etf.pretrain.data import TrainLoader, open_task, transforms

SHARDS, EACH, BATCH, LATE = 16, 500, 8, 900
"""Shards, images of each, images of a batch, and the batch that is waited for."""


def write(root: Path, files: list[Path]) -> None:
    """The same images as tar files and as parquet files."""
    columns = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    for folder in ("wds", "hfids"):
        (root / folder).mkdir(parents=True)
    for shard in range(SHARDS):
        images = [files[(shard * EACH + i) % len(files)].read_bytes() for i in range(EACH)]
        with webdataset.TarWriter(str(root / "wds" / f"train-{shard:04d}.tar")) as tar:
            for i, image in enumerate(images):
                tar.write({"__key__": f"{shard:04d}{i:05d}", "jpg": image, "cls": str(i % 10).encode()})
        rows = {"image": [{"bytes": image, "path": None} for image in images], "label": [i % 10 for i in range(EACH)]}
        table = datasets.Dataset.from_dict(rows, features=columns)
        table.to_parquet(str(root / "hfids" / f"train-{shard:05d}-of-{SHARDS:05d}.parquet"))


def seconds_to(root: Path, kind: str, workers: int, batch: int, entered: int) -> float:
    """Seconds until a batch is there, from one on that may be before it."""
    where: dict[str, Any] = {"dataset": f"hfids/{root}", "data_dir": root / "cache", "train_split": "train"}
    if kind == "wds":
        where = {"dataset": "wds/x", "data_dir": root, "train_split": f"train-{{0000..{SHARDS - 1:04d}}}.tar"}
    where["train_split"] += f"|{SHARDS * EACH}"
    where["val_split"] = where["train_split"]
    config = PretrainConfig(
        model="resnet50", out=Path("unused"), num_classes=10, batch_size=BATCH, workers=workers, **where
    )
    task: Any = open_task(config)
    about = timm.data.resolve_data_config({}, model=timm.create_model("resnet50", num_classes=2))
    task.train.transform, _ = transforms(config, about)
    loader = TrainLoader(task.train, config, 0, 1)
    started = time.perf_counter()
    next(islice(loader.epoch(0, entered), batch - entered, None))
    seconds = time.perf_counter() - started
    loader.loader.close()
    return seconds


def main() -> None:
    datasets.disable_progress_bars()
    print(f"| reader, workers | batch 0, s | batch {LATE}, entered there | entered at 0 |")
    print("|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write(root, sorted((draw(root / "drawn", 1, 300, 256) / "train").rglob("*.jpg")))
        ways = ((0, 0), (LATE, LATE), (LATE, 0))
        for kind in ("wds", "hfids"):
            for workers in (0, 2):
                cells = [f"{seconds_to(root / kind, kind, workers, *way):.1f}" for way in ways]
                print(f"| {kind}, {workers} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
