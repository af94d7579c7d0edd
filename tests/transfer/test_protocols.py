import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from tests.transfer.conftest import blobs
from timm_etf import UsageError
from timm_etf.transfer import Features, Result, fewshot, find_targets, finetune, knn, linear_probe, open_splits
from timm_etf.transfer.fine_tuning import FIRST_RATES, LEARNING_RATES, Budget, best_rate
from timm_etf.transfer.neighbours import vote
from timm_etf.transfer.probe import STRENGTHS
from timm_etf.transfer.result import validation_mask


def test_the_probe_separates_what_is_separable_and_not_what_is_not() -> None:
    result = linear_probe(blobs(400, seed=1), blobs(200, seed=2))
    assert result.accuracy() > 95
    assert result.chosen["strength"] in STRENGTHS
    low, high = result.interval()
    assert low <= result.accuracy() <= high
    shuffled = blobs(400, seed=1)
    noise = Features(shuffled.x, np.random.default_rng(0).permutation(shuffled.y), shuffled.class_names)
    assert linear_probe(noise, blobs(200, seed=2)).accuracy() < 60


def test_scale_and_constant_features_do_not_matter_to_the_probe() -> None:
    train, test = blobs(400, seed=1), blobs(200, seed=2)

    def changed(f: Features) -> Features:
        x = np.concatenate([1000 * f.x + 7, np.full((len(f.x), 2), 3, np.float32)], axis=1)
        return Features(x, f.y, f.class_names)

    same = linear_probe(train, test).correct == linear_probe(changed(train), changed(test)).correct
    assert same.mean() > 0.99


def test_the_targets_own_validation_split_chooses() -> None:
    train, test = blobs(120, seed=1, dim=60, spread=3), blobs(400, seed=2, dim=60, spread=3)
    chosen = {linear_probe(train, test, v).chosen["strength"] for v in (blobs(400, 3, dim=60, spread=3), train)}
    assert len(chosen) == 2  # what is trained on itself likes weak regularisation, unseen images strong
    assert min(chosen) == linear_probe(train, test, train).chosen["strength"]


@pytest.mark.parametrize("protocol", [linear_probe, knn])
def test_the_seed_is_the_validation_fifth_and_nothing_else(protocol: Callable[..., Result]) -> None:
    train, test = blobs(90, seed=1, spread=2), blobs(300, seed=2, spread=2)
    by_seed = [protocol(train, test, seed=seed) for seed in range(6)]
    for seed, found in enumerate(by_seed):
        again = protocol(train, test, seed=seed)
        assert (again.correct == found.correct).all()
        assert again.chosen == found.chosen
    by_choice = {tuple(found.chosen.values()): found for found in by_seed}
    assert len(by_choice) > 1  # other validation images choose otherwise
    for found in by_seed:  # and what was chosen is all that they decide
        assert (found.correct == by_choice[tuple(found.chosen.values())].correct).all()
    # Images that are named do not depend on a seed.
    named = [protocol(train, test, blobs(60, seed=3, spread=2), seed=seed) for seed in (0, 1)]
    assert (named[0].correct == named[1].correct).all()


class _Float32Only(TorchDispatchMode):
    """Fails where a tensor is made that Apple's GPUs cannot hold."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        assert getattr(found, "dtype", None) != torch.float64, func
        return found


@pytest.mark.parametrize("protocol", [linear_probe, knn, partial(fewshot, shots=5)])
def test_no_protocol_needs_float64(protocol: Callable[..., Result]) -> None:
    with _Float32Only():
        protocol(blobs(90, seed=1), blobs(30, seed=2))


def test_validation_fifth() -> None:
    y = np.repeat(np.arange(5), [1, 2, 3, 10, 50])
    order = np.random.default_rng(0).permutation(len(y))
    held = validation_mask(y[order], seed=0)
    assert np.bincount(y[order][held], minlength=5).tolist() == [0, 0, 1, 2, 10]


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(3, 80),
    m=st.integers(1, 30),
    dim=st.integers(2, 8),
    classes=st.integers(2, 5),
    seed=st.integers(0, 1000),
    temperature=st.sampled_from([0.02, 0.07, 0.2]),
    data=st.data(),
)
def test_knn_is_the_brute_force_answer(
    n: int, m: int, dim: int, classes: int, seed: int, temperature: float, data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, n))
    rng = np.random.default_rng(seed)
    x, queries = (rng.normal(size=(size, dim)).astype(np.float32) for size in (n, m))
    x, queries = (a / np.linalg.norm(a, axis=1, keepdims=True) for a in (x, queries))
    y = rng.integers(0, classes, n)
    got = vote(*map(torch.from_numpy, (x, y, queries)), classes, [(1, 0.07), (k, temperature)])[1].numpy()
    for query, answer in zip(queries.astype(np.float64), got, strict=True):
        similarity = x.astype(np.float64) @ query
        votes = np.zeros(classes)
        for i in np.argsort(-similarity)[:k]:
            votes[y[i]] += np.exp(similarity[i] / temperature)
        assert votes[answer] >= votes.max() * (1 - 1e-4)


def test_knn_on_features_that_tell_the_classes_apart() -> None:
    result = knn(blobs(400, seed=1), blobs(200, seed=2))
    assert result.accuracy() > 95
    assert set(result.chosen) == {"k", "temperature"}
    # More queries than a block, and more neighbours asked for than there are.
    assert knn(blobs(40, seed=1), blobs(2500, seed=2)).accuracy() > 80


@pytest.mark.parametrize("size", [1, 16, 63])
def test_knn_in_parts_is_knn(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    train, test = blobs(150, seed=1, spread=3), blobs(90, seed=2, spread=3)
    x, y, queries = map(torch.from_numpy, (train.x, train.y, test.x))
    settings = [(1, 0.07), (20, 0.02), (30, 0.2)]
    rows = torch.arange(0, 150, 2)
    whole, half = vote(x, y, queries, 4, settings), vote(x[rows], y[rows], queries, 4, settings)
    monkeypatch.setattr("timm_etf.transfer.neighbours._NEIGHBOURS", size)
    monkeypatch.setattr("timm_etf.transfer.neighbours._QUERIES", 40)
    assert torch.equal(vote(x, y, queries, 4, settings), whole)
    assert torch.equal(vote(x, y, queries, 4, settings, rows), half)


def test_knn_chooses_by_so_many_images_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    train, test = blobs(400, seed=1), blobs(200, seed=2)
    assert knn(train, test).treatment == "unit length"
    monkeypatch.setattr("timm_etf.transfer.neighbours.MOST_QUERIES", 30)
    result = knn(train, test)
    assert result.treatment == "unit length; chosen by 30 of 80 validation images"
    assert result.accuracy() > 95


def test_more_shots_are_better_and_draws_are_averaged() -> None:
    train, test = blobs(400, seed=1, spread=2), blobs(400, seed=2, spread=2)
    one, ten = fewshot(train, test, 1), fewshot(train, test, 10)
    assert 40 < one.accuracy() < ten.accuracy() - 10
    assert len(np.unique(one.correct)) > 5
    assert one.correct.max() <= 1


def test_a_draw_takes_so_many_of_every_class() -> None:
    # Class 1 has its images far from each other: only a draw that has all of them knows its test images.
    x = np.eye(6, dtype=np.float32)[[0, 0, 0, 0, 1, 2, 3]]
    train = Features(x, np.array([0, 0, 0, 0, 1, 1, 1]), ("a", "b"))
    assert fewshot(train, train, 3, draws=4).accuracy() == 100
    assert fewshot(train, train, 4, draws=1).chosen["classes_with_fewer"] == 1
    assert fewshot(train, train, 1, draws=4).accuracy() < 100


def test_too_few_images_for_a_shot() -> None:
    with pytest.raises(UsageError, match=r"4 of 4 classes have fewer than 10 training images, such as '0'"):
        fewshot(blobs(20, seed=1), blobs(20, seed=2), 10)


@given(st.floats(-9, 3), st.booleans())
def test_the_best_learning_rate_is_found_and_its_neighbours_were_tried(peak: float, rounded: bool) -> None:
    def score(lr: float) -> float:
        tried.append(lr)
        distance = abs(np.log(lr) - peak)
        return -float(round(distance) if rounded else distance)

    tried: list[float] = []
    found, asked = best_rate(score), list(tried)
    scores = [score(lr) for lr in LEARNING_RATES]
    assert score(found) == max(scores)
    assert len(set(asked)) == len(asked)
    beside = {LEARNING_RATES.index(found) + step for step in (-1, 1)}
    wanted = {lr for place, lr in enumerate(LEARNING_RATES) if place in beside} | {*FIRST_RATES}
    assert not wanted - set(asked)
    ends = sorted(LEARNING_RATES.index(lr) for lr in asked)
    assert ends == list(range(ends[0], ends[-1] + 1))


def test_a_target_that_tells_no_rates_apart_costs_no_further_ones() -> None:
    tried: list[float] = []
    assert best_rate(lambda lr: float(tried.append(lr) or 0.5)) == FIRST_RATES[1]
    assert tried == list(FIRST_RATES)


@pytest.mark.slow
def test_fine_tuning_is_a_function_of_its_seed_for_any_number_of_workers(images: Path) -> None:
    [target], _ = find_targets([f"{images},name=bars,test=validation,hflip=yes"], images)
    splits = open_splits(target)
    made: list[torch.nn.Module] = []

    def build(num_classes: int) -> torch.nn.Module:
        size = {"input_size": (3, 32, 32)}
        made.append(
            timm.create_model("test_resnet", num_classes=num_classes, pretrained_cfg_overlay=size, drop_rate=0.5)
        )
        return made[-1]

    def trained(workers: int, seed: int, noise: int) -> list[torch.Tensor]:
        random.seed(noise)  # what the process has drawn before decides nothing
        torch.manual_seed(noise)
        finetune(build, splits, Budget(3, 16, workers), seed=seed)
        return list(made[-1].state_dict().values())

    first = trained(0, seed=0, noise=1)
    for workers, noise in ((0, 2), (1, 3), (2, 4)):
        assert all(map(torch.equal, first, trained(workers, seed=0, noise=noise))), workers
    assert not all(map(torch.equal, first, trained(0, seed=1, noise=1)))
