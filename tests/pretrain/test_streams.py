import io
import itertools
import json
import random
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from PIL.PngImagePlugin import PngImageFile
from torchvision.transforms.functional import pil_to_tensor

from tests import commands
from tests.pretrain.runs import arguments, assert_same, config, wait_for_checkpoint
from timm_etf import UsageError
from timm_etf.loading.streams import _EveryNth
from timm_etf.pretrain.config import PretrainConfig
from timm_etf.pretrain.data import TrainLoader, open_task, transforms

SHARDS = ("--dataset", "wds/x", "--num-classes", 5, "--epochs", 3, "--mixup", 0.2, "--hflip", 0.5)
SHARDS += ("--train-split", "train-{0000..0001}.tar|122", "--val-split", "validation-0000.tar|37")


def test_a_stream_that_is_interrupted_and_resumed_is_the_straight_run(shards: Path, tmp_path: Path) -> None:
    more = (*SHARDS, "--workers", 1, "--reprob", 0.5, "--epoch-repeats", 2)
    straight, out = tmp_path / "straight", tmp_path / "run"
    commands.run(*arguments(shards, straight, *more), check=True)
    command = commands.Command(*arguments(shards, out, *more))
    wait_for_checkpoint(out, command)
    command.send_signal_to_group(signal.SIGTERM)
    assert command.wait() == 128 + signal.SIGTERM
    commands.run(*arguments(shards, out, *more, "--resume"), check=True)
    assert_same(out, straight)


def _write(root: Path, kind: str, split: str, sizes: list[int]) -> None:
    """Shards of small images whose labels number them."""
    import datasets
    import webdataset

    (root / "data").mkdir(parents=True, exist_ok=True)
    numbers = iter(range(sum(sizes)))
    for shard, size in enumerate(sizes):
        labels = [next(numbers) for _ in range(size)]
        images = []
        for label in labels:
            with io.BytesIO() as file:
                Image.new("RGB", (8, 8), (label, 0, 0)).save(file, "png")
                images.append(file.getvalue())
        if kind == "wds":
            with webdataset.TarWriter(str(root / "data" / f"{split}-{shard:04d}.tar")) as tar:
                for label, image in zip(labels, images, strict=True):
                    tar.write({"__key__": f"{label:05d}", "png": image, "cls": str(label).encode()})
        else:
            columns = {"image": datasets.Image(), "label": datasets.Value("int64")}
            rows = {"image": [{"bytes": image, "path": None} for image in images], "label": labels}
            table = datasets.Dataset.from_dict(rows, features=datasets.Features(columns))
            table.to_parquet(str(root / "data" / f"{split}-{shard:05d}-of-{len(sizes):05d}.parquet"))


def _config(root: Path, kind: str, train: list[int], val: list[int] | None = None, **changes: Any) -> PretrainConfig:
    """Settings of a run on such shards, which are written."""
    settings: dict[str, Any] = {"num_classes": 256, "batch_size": 8}
    for split, sizes in (("train", train), ("validation", val or [8])):
        _write(root, kind, split, sizes)
        name = f"{split}-{{0000..{len(sizes) - 1:04d}}}.tar" if kind == "wds" else split
        settings[f"{split.removesuffix('idation')}_split"] = f"{name}|{sum(sizes)}"
    settings["dataset"] = "wds/x" if kind == "wds" else f"hfids/{root}"
    return config(root / "data" if kind == "wds" else root / "cache", Path("run"), **settings | changes)


def _train_loader(settings: PretrainConfig, rank: int = 0, world_size: int = 1) -> TrainLoader:
    train: Any = open_task(settings).train
    train.transform = pil_to_tensor
    return TrainLoader(train, settings, rank, world_size)


def _labels(loader: TrainLoader, epoch: int, first_batch: int = 0) -> list[int]:
    try:
        return [int(label) for _, labels in loader.epoch(epoch, first_batch) for label in labels]
    finally:
        loader.loader.close()


RANK = """
import json, sys
from pathlib import Path

import PIL.Image
from accelerate import Accelerator
from accelerate.utils import gather_object
from torchvision.transforms.functional import pil_to_tensor

from timm_etf.pretrain import data
from timm_etf.pretrain.config import PretrainConfig

decoded = 0
load = PIL.Image.open


def count(*args, **kwargs):
    global decoded
    decoded += 1
    return load(*args, **kwargs)


def labels(batches):
    return [int(label) for _, of_batch in batches for label in of_batch]


if __name__ == "__main__":
    PIL.Image.open = count
    accelerator = Accelerator()
    config = PretrainConfig(**json.loads(sys.argv[1]))
    task = data.open_task(config)
    task.train.transform = task.val.transform = pil_to_tensor
    place = accelerator.process_index, accelerator.num_processes
    train, val = data.TrainLoader(task.train, config, *place), data.val_loader(task.val, config, *place)
    seen = {"train": [labels(train.epoch(epoch)) for epoch in range(2)]}
    decoded = 0
    seen["val"], seen["decoded"] = [labels(val) for _ in range(2)], decoded
    train.loader.close(), val.close()
    seen = gather_object([seen])
    if accelerator.is_main_process:
        print(json.dumps(seen))
    accelerator.end_training()
"""


def _on_two_processes(settings: PretrainConfig) -> Any:
    given = {k: v for k, v in vars(settings).items() if v is not None}
    first, _ = commands.run_ranks(2, json.dumps(given, default=str), code=RANK)
    return json.loads(first.stdout.splitlines()[-1])


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize(
    ("kind", "shards", "val"),
    [("wds", 4, [9, 7, 8, 6, 7]), ("wds", 2, [37]), ("hfids", 2, [9, 7, 8, 6, 7]), ("hfids", 2, [12, 9])],
)
def test_two_processes_see_every_sample_once(
    tmp_path: Path, kind: str, shards: int, val: list[int], workers: int
) -> None:
    shards *= max(1, workers)
    seen = _on_two_processes(_config(tmp_path / "data", kind, [128 // shards] * shards, val, workers=workers))
    for epoch in range(2):
        parts = [rank["train"][epoch] for rank in seen]
        assert [len(part) for part in parts] == [64, 64]
        assert sorted(itertools.chain(*parts)) == list(range(128))
        assert sorted(itertools.chain(*(rank["val"][epoch] for rank in seen))) == list(range(sum(val)))
    assert seen[0]["train"][0] != seen[0]["train"][1]
    if workers == 0 and len(val) > 1:  # in workers, the count is theirs
        assert [rank["decoded"] for rank in seen] == [2 * len(rank["val"][0]) for rank in seen]


@pytest.mark.parametrize("kind", ["wds", "hfids"])
@pytest.mark.parametrize(("workers", "sizes"), [(1, [59, 66]), (2, [30, 31, 33, 31])])
@pytest.mark.slow
def test_every_process_has_as_many_batches(tmp_path: Path, kind: str, workers: int, sizes: list[int]) -> None:
    # Unequal shards, and nothing is a multiple of the batch size. No more than a shard for each worker: datasets reads
    # several in threads, for which it waits five seconds at the end of each pass.
    settings = _config(tmp_path / "data", kind, sizes, workers=workers)
    parts = [_labels(_train_loader(settings, rank, 2), epoch=1) for rank in range(2)]
    assert [len(part) for part in parts] == [8 * (125 // 16)] * 2


@pytest.mark.parametrize("kind", ["wds", "hfids"])
def test_too_few_shards_are_refused(tmp_path: Path, kind: str) -> None:
    settings = _config(tmp_path / "data", kind, [16] * 4, workers=3)
    with pytest.raises(UsageError, match=r"has 4 shards, too few for 2 processes x 3 workers: use --workers 2\.$"):
        _train_loader(settings, 0, 2)
    _train_loader(config(settings.data_dir, Path("run"), **_changes(settings, workers=2)), 0, 2)
    if kind == "wds":
        with pytest.raises(UsageError, match=r"4 shards, .* 5 processes x 3 workers: start fewer processes"):
            _train_loader(settings, 0, 5)
    else:  # which then shares out samples instead of shards
        fewer = config(settings.data_dir, Path("run"), **_changes(settings, workers=2))
        parts = [_labels(_train_loader(fewer, rank, 5), epoch=0) for rank in range(5)]
        assert all(len(part) == 8 for part in parts)
    more = config(settings.data_dir, Path("run"), **_changes(settings, workers=1, aug_repeats=3))
    with pytest.raises(UsageError, match=r"--aug-repeats needs data in any order"):
        _train_loader(more)


def _changes(settings: PretrainConfig, **changes: Any) -> dict[str, Any]:
    names = ("dataset", "train_split", "val_split", "num_classes", "batch_size", "workers")
    return {name: getattr(settings, name) for name in names} | changes


@pytest.mark.parametrize("kind", ["wds", "hfids"])
def test_an_uneven_division_is_told(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    settings = _config(tmp_path / "data", kind, [16] * 3, workers=2)
    capsys.readouterr()
    loader = _train_loader(settings)
    assert capsys.readouterr().err == (
        "warning: 3 shards are not evenly divided among 2 workers: about 16.7% of the images are left out of an epoch, "
        "and as many are repeated; --workers 1 divides them evenly.\n"
    )
    times = Counter(Counter(_labels(loader, epoch=0)).values())
    assert times == {1: 32, 2: 8}  # of 48
    _train_loader(config(settings.data_dir, Path("run"), **_changes(settings, workers=1)))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("kind", ["wds", "hfids"])
@pytest.mark.slow
def test_passes_of_a_stream(tmp_path: Path, kind: str) -> None:
    settings = _config(tmp_path / "data", kind, [16] * 2, workers=2, epoch_repeats=3)
    loader = _train_loader(settings)
    assert loader.batches_per_epoch == 12
    seen = _labels(loader, epoch=1)
    passes = [seen[i : i + 32] for i in (0, 32, 64)]
    assert all(sorted(one) == list(range(32)) for one in passes)
    assert passes[0] != passes[1]
    assert passes[1] != passes[2]
    assert _labels(_train_loader(settings), 1, 6) == seen[6 * 8 :]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["wds", "hfids"])
def test_a_stream_is_entered_without_decoding_what_was_seen(
    tmp_path: Path, kind: str, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A worker repeats the first shard to give as many batches as the other: batch 6 is among its second ones.
    settings = _config(tmp_path / "data", kind, [17, 47], workers=workers)
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)  # see above

    def images(first_batch: int) -> list[torch.Tensor]:
        loader = _train_loader(settings)
        loader.source.dataset.transform = lambda x: pil_to_tensor(x).int() + torch.randint(9, ())  # type: ignore[union-attr]
        try:
            return [pixels for pixels, _ in loader.epoch(1, first_batch)]
        finally:
            loader.loader.close()

    straight, decoded = images(0), []
    load = PngImageFile.load
    monkeypatch.setattr(PngImageFile, "load", lambda image: (decoded.append(image), load(image))[1])  # type: ignore[func-returns-value]
    for first_batch in (1, 5, 6):
        decoded.clear()
        assert torch.equal(torch.stack(images(first_batch)), torch.stack(straight[first_batch:]))
        if workers == 0:  # in workers, the count is theirs
            assert len({id(image) for image in decoded}) <= 64 - 8 * first_batch + 1


def test_a_stream_that_ends_early_is_refused(tmp_path: Path) -> None:
    settings = _config(tmp_path / "data", "wds", [16, 0], workers=2)
    with pytest.raises(UsageError, match=r"ended after 1 of 2 batches .* --train-split 'train-\{0000..0001\}.tar\|"):
        _labels(_train_loader(settings), epoch=0)


@pytest.mark.parametrize("option", ["train_split", "val_split"])
@pytest.mark.parametrize(
    ("kind", "split", "says"),
    [
        ("wds", "train-{0000..0003}.tar|64", r"there is no train-0002\.tar in .*data"),
        ("hfids", "other|32", r"Cannot open the 'other' split of hfids/.*: Bad split: other\. Available splits"),
    ],
)
def test_what_is_missing_is_named(tmp_path: Path, kind: str, split: str, says: str, option: str) -> None:
    settings = _config(tmp_path / "data", kind, [16] * 2, **{option: split})
    with pytest.raises(UsageError, match=says):
        open_task(settings)


class _Stream:
    def __iter__(self) -> object:
        return iter(range(11))


@pytest.mark.parametrize("world", [1, 2, 3, 12])
def test_streams_are_shared_out_exactly(world: int) -> None:
    parts = [list(_EveryNth(_Stream(), rank, world)) for rank in range(world)]
    assert sorted(item for part in parts for item in part) == list(range(11))


def _batches(
    shards: Path, epochs: list[tuple[int, int]], *, seed: int = 0, rank: int = 0, workers: int = 1
) -> list[torch.Tensor]:
    """The images that a fresh loader gives for each (epoch, first batch)."""
    split = "train-{0000..0001}.tar|122"
    settings = config(
        shards, Path("run"), dataset="wds/x", train_split=split, num_classes=5, seed=seed, workers=workers
    )
    train: Any = timm.data.create_dataset(
        "wds/x", root=str(shards), split=split, is_training=True, batch_size=16, seed=seed, num_samples=122
    )
    net = timm.create_model("test_resnet")
    train.transform, _ = transforms(settings, timm.data.resolve_data_config({"input_size": (3, 32, 32)}, model=net))
    loader = TrainLoader(train, settings, rank, world_size=1 + rank)
    try:
        return [torch.cat([images for images, _ in loader.epoch(*at)]) for at in epochs]
    finally:
        loader.loader.close()


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_stream_depends_on_seed_rank_and_epoch_alone(shards: Path, workers: int) -> None:
    first, second = _batches(shards, [(0, 0), (1, 0)], workers=workers)
    (resumed,) = _batches(shards, [(1, 0)], workers=workers)
    assert torch.equal(resumed, second)  # not what the first epoch drew
    (entered,) = _batches(shards, [(1, 3)], workers=workers)
    assert torch.equal(entered, second[3 * 16 :])
    random.seed(7), np.random.seed(7), torch.manual_seed(7)
    assert torch.equal(_batches(shards, [(0, 0)], workers=workers)[0], first)
    assert not torch.equal(first[:48], second[:48])
    (other_seed,) = _batches(shards, [(0, 0)], seed=1, workers=workers)
    assert not torch.equal(other_seed, first)
    if workers < 2:  # of two shards
        (other_rank,) = _batches(shards, [(0, 0)], rank=1, workers=workers)  # half as many batches
        assert not torch.equal(other_rank, first[: len(other_rank)])
