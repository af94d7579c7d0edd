import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import Dataset

from tests.pretrain.runs import config
from timm_etf.data.seeded import SeededDataset
from timm_etf.pretrain.data import TrainLoader, _EveryNth, open_task, transforms, val_loader
from timm_etf.pretrain.sampling import EpochSampler


@given(
    n=st.integers(1, 200),
    batch=st.integers(1, 16),
    world=st.integers(1, 4),
    seed=st.integers(0, 5),
    epoch=st.integers(0, 3),
    data=st.data(),
)
@settings(deadline=None)
def test_epoch_sampler(n: int, batch: int, world: int, seed: int, epoch: int, data: st.DataObject) -> None:
    samplers = [EpochSampler(n, batch, rank, world, seed) for rank in range(world)]
    steps = samplers[0].steps_per_epoch
    assert steps == n // (batch * world)
    seen = []
    for sampler in samplers:
        sampler.start_at(epoch, 0)
        items = list(sampler)
        assert len(items) == len(sampler) == steps * batch
        assert all(item // n == epoch for item in items)
        first = data.draw(st.integers(0, steps))
        sampler.start_at(epoch, first)
        assert list(sampler) == items[first * batch :]  # a resume sees what it would have seen
        seen += [item % n for item in items]
    assert len(set(seen)) == len(seen)  # no sample twice over all processes


def test_epochs_differ_and_one_process_sees_what_two_see() -> None:
    one, two = EpochSampler(40, 8, 0, 1, 0), [EpochSampler(40, 4, rank, 2, 0) for rank in (0, 1)]
    orders = []
    for epoch in (0, 1):
        for sampler in (one, *two):
            sampler.start_at(epoch, 0)
        whole = torch.tensor(list(one)).view(5, 8)
        halves = torch.cat([torch.tensor(list(s)).view(5, 4) for s in two], dim=1)
        assert torch.equal(whole, halves)
        orders.append(whole % 40)
    assert not torch.equal(*orders)


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


class _Stream:
    dist_rank, dist_num_replicas = 7, 9

    def __iter__(self) -> object:
        assert (self.dist_rank, self.dist_num_replicas) == (0, 1)  # told not to split by itself
        return iter(range(11))


@pytest.mark.parametrize("world", [1, 2, 3, 12])
def test_streams_are_shared_out_exactly(world: int) -> None:
    parts = [list(_EveryNth(_Stream(), rank, world)) for rank in range(world)]
    assert sorted(item for part in parts for item in part) == list(range(11))


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


def _batches(
    shards: Path, epochs: list[tuple[int, int]], *, seed: int = 0, rank: int = 0, workers: int = 1
) -> list[torch.Tensor]:
    """The images that a fresh loader gives for each (epoch, first step)."""
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
    (other_rank,) = _batches(shards, [(0, 0)], rank=1, workers=workers)  # half as many steps
    assert not torch.equal(other_rank, first[: len(other_rank)])
