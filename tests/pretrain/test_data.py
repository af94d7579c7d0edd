import itertools
import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.data.loader import PrefetchLoader
from torch.utils.data import DataLoader, Dataset

from tests.pretrain.runs import config
from timm_etf.data.seeded import SeededDataset, random_states
from timm_etf.loading.loader import Pixels
from timm_etf.loading.sampling import EpochSampler
from timm_etf.pretrain.data import TrainLoader, open_task, transforms, val_loader


@given(
    n=st.integers(1, 200),
    batch=st.integers(1, 16),
    world=st.integers(1, 4),
    passes=st.integers(1, 3),
    repeats=st.integers(1, 4),
    epoch=st.integers(0, 3),
    data=st.data(),
)
@settings(deadline=None)
def test_epoch_sampler(
    n: int, batch: int, world: int, passes: int, repeats: int, epoch: int, data: st.DataObject
) -> None:
    samplers = [EpochSampler(n, batch, rank, world, 0, passes=passes, repeats=repeats) for rank in range(world)]
    batches = samplers[0].batches_per_epoch
    assert batches == passes * n // (batch * world)
    seen = []
    for sampler in samplers:
        sampler.start_at(epoch)
        items = list(sampler)
        assert len(items) == len(sampler) == batches * batch
        first = data.draw(st.integers(0, batches))
        sampler.start_at(epoch, first)
        assert list(sampler) == items[first * batch :]  # a resume sees what it would have seen
        seen.append(items)
    if repeats == 1:
        order = [item for b in range(batches) for items in seen for item in items[b * batch : (b + 1) * batch]]
    else:  # augmentations of one image go to several processes
        order = [item for together in zip(*seen, strict=True) for item in together]
    assert len(set(order)) == len(order)  # no augmentation twice
    for number in range(passes):
        part = order[number * n : (number + 1) * n]
        # A pass holds ceil(n / repeats) images, each in a row of its repeats, each of which is a round of its own.
        rows = [part[i : i + repeats] for i in range(0, len(part), repeats)]
        assert all(len({item % n for item in row}) == 1 for row in rows)
        assert len({row[0] % n for row in rows}) == len(rows)
        start = (epoch * passes + number) * repeats
        assert all([item // n for item in row] == list(range(start, start + len(row))) for row in rows)


def test_passes_and_epochs_differ_and_one_process_sees_what_two_see() -> None:
    one, two = EpochSampler(40, 8, 0, 1, 0, passes=2), [EpochSampler(40, 4, r, 2, 0, passes=2) for r in (0, 1)]
    orders = []
    for epoch in (0, 1):
        for sampler in (one, *two):
            sampler.start_at(epoch)
        whole = torch.tensor(list(one)).view(10, 8)
        halves = torch.cat([torch.tensor(list(s)).view(10, 4) for s in two], dim=1)
        assert torch.equal(whole, halves)
        orders += (whole % 40).flatten().split(40)
    assert all(sorted(order.tolist()) == list(range(40)) for order in orders)
    assert not any(torch.equal(*pair) for pair in itertools.combinations(orders, 2))


def test_two_accumulated_batches_are_those_of_two_processes() -> None:
    one, two = EpochSampler(40, 4, 0, 1, 0, repeats=3), [EpochSampler(40, 4, r, 2, 0, repeats=3) for r in (0, 1)]
    steps = torch.tensor(list(one)).view(5, 8)
    assert torch.equal(steps, torch.stack([torch.tensor(list(s)).view(5, 4) for s in two], dim=2).flatten(1))


class _Noise(Dataset[list[float]]):
    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> list[float]:
        return [index, random.random(), float(np.random.rand()), float(torch.rand(()))]


def test_augmentation_depends_on_seed_epoch_and_index_alone() -> None:
    dataset = SeededDataset(_Noise(), seed=1)
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    first = dataset[13]
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states
    random.random(), np.random.rand(), torch.rand(3)
    assert dataset[13] == first
    assert first[0] == 3
    assert dataset[3] != first  # the same image in another epoch
    assert SeededDataset(_Noise(), seed=2)[13] != first


def test_augmentation_is_the_same_in_workers() -> None:
    dataset = SeededDataset(_Noise(), seed=1)
    alone, shared = (
        torch.stack([torch.stack(batch) for batch in DataLoader(dataset, batch_size=2, num_workers=workers)])
        for workers in (0, 2)
    )
    assert torch.equal(alone, shared)


def test_a_loader_entered_at_the_end_of_an_epoch_goes_on_with_the_next(images: Path, tmp_path: Path) -> None:
    settings = config(images, tmp_path)
    task = open_task(settings)
    task.train.transform = task.val.transform = timm.data.create_transform(32)  # type: ignore[attr-defined]
    loader = TrainLoader(task.train, settings, rank=0, world_size=1)
    assert loader.steps_per_epoch == 7
    assert [len(list(loader.epoch(0, first))) for first in (5, 7)] == [2, 0]
    assert len(list(loader.epoch(1))) == 7
    val = [targets for _, targets in val_loader(task.val, settings, rank=1, world_size=2)]
    assert sum(map(len, val)) == 18  # of 37


@pytest.mark.parametrize(("aug_repeats", "epoch_repeats", "accumulate"), [(0, 0, 2), (3, 0, 1), (2, 3, 4)])
def test_repeats_and_passes_of_a_loader(
    images: Path, tmp_path: Path, aug_repeats: int, epoch_repeats: int, accumulate: int
) -> None:
    repeats = {"aug_repeats": aug_repeats, "epoch_repeats": epoch_repeats, "grad_accum_steps": accumulate}
    settings = config(images, tmp_path, **repeats)
    task = open_task(settings)
    task.train.transform, _ = transforms(settings, _data_config(3))  # type: ignore[attr-defined]
    loader = TrainLoader(task.train, settings, rank=0, world_size=1)
    batches = max(1, epoch_repeats) * 122 // 16
    assert (loader.batches_per_epoch, loader.steps_per_epoch) == (batches, -(-batches // accumulate))
    whole = torch.cat([x for x, _ in loader.epoch(1)])
    assert len(whole) == 16 * batches
    assert len(whole.flatten(1).unique(dim=0)) == len(whole)  # no augmentation twice
    assert torch.equal(torch.cat([x for x, _ in loader.epoch(1, 2)]), whole[32:])


def _data_config(in_chans: int) -> dict[str, Any]:
    resolved = timm.data.resolve_data_config({"input_size": (in_chans, 32, 32)}, model=timm.create_model("test_resnet"))
    return resolved | {key: resolved[key][:in_chans] for key in ("mean", "std")}


@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize("auto_augment", [None, "augmix-m3"])
def test_pixels_are_those_of_timms_float_transforms(images: Path, in_chans: int, auto_augment: str | None) -> None:
    settings = config(images, Path("run"), in_chans=in_chans, auto_augment=auto_augment, channels_last=True)
    data_config = _data_config(in_chans)
    jitter = settings.color_jitter if in_chans == 3 else None
    shared = {key: data_config[key] for key in ("input_size", "interpolation", "mean", "std")}
    plain = (
        timm.data.create_transform(**shared, is_training=True, color_jitter=jitter, auto_augment=auto_augment),
        timm.data.create_transform(**shared, crop_pct=data_config["crop_pct"]),
    )
    ours = transforms(settings, data_config)
    pixels = Pixels(data_config, torch.device("cpu"), channels_last=True)
    path = next((images / "train").rglob("*.png"))
    image = Image.open(path).convert("L" if in_chans == 1 else "RGB")
    for integer, expected in zip(ours, plain, strict=True):
        for seed in range(5):
            with random_states(seed):
                x = integer(image)
            with random_states(seed):
                y = expected(image)
            assert (x.dtype, x.shape) == (torch.uint8, (in_chans, 32, 32))
            found = pixels(x[None])
            assert found.is_contiguous(memory_format=torch.channels_last)
            torch.testing.assert_close(found[0], y, atol=1e-5, rtol=0)


@pytest.mark.parametrize("reprob", [0.0, 0.5])
def test_pixels_are_those_of_timms_prefetcher(reprob: float) -> None:
    batch = torch.randint(0, 256, (16, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    statistics: dict[str, Any] = {key: _data_config(3)[key] for key in ("mean", "std")}
    prefetcher: Any = PrefetchLoader(
        [(batch, torch.arange(16))],  # type: ignore[arg-type]
        **statistics,
        device=torch.device("cpu"),
        re_prob=reprob,
    )
    pixels = Pixels(_data_config(3), torch.device("cpu"), reprob=reprob)
    with random_states(0):
        ((expected, _),) = prefetcher
    with random_states(0):
        found = pixels(batch, training=True)
    assert torch.equal(found, expected)
    assert torch.equal(found, pixels(batch)) == (reprob == 0)


def test_a_folder_is_listed_without_an_object_for_each_image(images: Path, tmp_path: Path) -> None:
    shutil.copytree(images / "train", tmp_path / "train")
    odd = tmp_path / "train" / "class3" / os.fsdecode(b"not utf-8 \xff.png")
    shutil.copy(tmp_path / "train" / "class3" / "0.png", odd)
    shutil.copytree(images / "validation", tmp_path / "validation")
    train: Any = open_task(config(tmp_path, tmp_path / "run")).train
    expected = timm.data.create_dataset("", root=str(tmp_path / "train")).reader.samples
    assert list(train.reader.samples) == expected
    assert (str(odd), 3) in train.reader.samples
    assert len(train) == 123
    assert train.reader.samples[-1] == expected[-1]
    with pytest.raises(IndexError):
        train.reader.samples[123]
    assert train.filename(5, absolute=True) == expected[5][0]
