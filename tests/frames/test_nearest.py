"""The frame nearest to a classifier: is it nearest, does it turn with the features, does it leave alone what it can."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from timm_etf import UsageError, frames
from timm_etf.frames.nearest import SLACK, least_squares_scale, looks_random, mean_cosine, turned


def rows(num_classes: int, dim: int, seed: int) -> Tensor:
    """Rows in groups, with an offset and a scale, as a trained classifier's are."""
    g = torch.Generator().manual_seed(seed)
    groups = torch.randn(1 + num_classes // 10, dim, generator=g, dtype=torch.float64)
    group = torch.randint(len(groups), (num_classes,), generator=g)
    noise = torch.randn(num_classes, dim, generator=g, dtype=torch.float64)
    return 0.3 * (noise + groups[group] + torch.randn(dim, generator=g, dtype=torch.float64))


def rotation(dim: int, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(dim, dim, generator=g, dtype=torch.float64))[0]


def distance(w: Tensor, frame: Tensor) -> float:
    """From the centred rows to the frame at its best scale."""
    centred = w - w.mean(0)
    scale = max(0.0, ((centred * frame).sum() / len(frame)).item())
    return (centred - scale * frame).norm().item()


SIMPLEX = st.integers(2, 30).flatmap(lambda k: st.tuples(st.just(k), st.integers(max(2, k - 1), 40)))
SEEDS = st.integers(0, 2**31)


@given(SIMPLEX, SEEDS)
@settings(deadline=None, max_examples=40)
def test_where_a_simplex_fits_none_is_nearer(shape: tuple[int, int], seed: int) -> None:
    num_classes, dim = shape
    w = rows(num_classes, dim, seed)
    found = frames.nearest(w)
    assert frames.is_simplex(found)
    closest = distance(w, found)
    for other in range(100):
        assert closest <= distance(w, found @ rotation(dim, other)) + 1e-9
    assert least_squares_scale(w, found) > 0
    cosines = [np.dot(a, b) / np.linalg.norm(a) for a, b in zip((w - w.mean(0)).numpy(), found.numpy(), strict=True)]
    assert mean_cosine(w, found) == pytest.approx(np.mean(cosines), abs=1e-9)


@given(st.one_of(SIMPLEX, st.just((40, 30)), st.just((50, 20))), SEEDS)
@settings(deadline=None, max_examples=20)
def test_it_turns_with_the_features_and_follows_the_classes(shape: tuple[int, int], seed: int) -> None:
    num_classes, dim = shape
    w, q = rows(num_classes, dim, seed), rotation(dim, seed)
    order = torch.randperm(num_classes, generator=torch.Generator().manual_seed(seed))
    found = frames.nearest(w)
    centred = w - w.mean(0)
    if torch.linalg.matrix_rank(centred) < min(num_classes - 1, dim):
        return  # two classes alike: which of several nearest frames is found is arbitrary
    torch.testing.assert_close(frames.nearest(w @ q), found @ q, atol=1e-7, rtol=0)
    torch.testing.assert_close(frames.nearest(w[order]), found[order], atol=1e-7, rtol=0)
    torch.testing.assert_close(frames.nearest(3 * w + 1), found, atol=1e-7, rtol=0)


@given(SIMPLEX, SEEDS)
@settings(deadline=None, max_examples=20)
def test_a_linear_map_before_the_nearest_simplex_gives_every_logit(shape: tuple[int, int], seed: int) -> None:
    # Nothing that the classifier tells apart is out of the simplex's reach: S pinv(S) W = W, for centred rows.
    w = rows(*shape, seed)
    found, centred = frames.nearest(w), w - w.mean(0)
    features = torch.randn(50, shape[1], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    exact = features @ (torch.linalg.pinv(found) @ centred).T
    torch.testing.assert_close(exact @ found.T, features @ centred.T, atol=1e-10, rtol=0)


def divergence(frame: Tensor, scale: float, features: Tensor, logits: Tensor) -> float:
    p, q = logits.double().softmax(1), (scale * features.double() @ frame.T).softmax(1)
    return (p * (p / q).log()).sum(1).mean().item()


@pytest.mark.parametrize(
    ("num_classes", "dim"), [(10, 32), (33, 32), (50, 32), pytest.param(100, 32, marks=pytest.mark.slow)]
)
def test_turned_by_features_it_is_still_the_frame_and_says_more_of_what_was_said(num_classes: int, dim: int) -> None:
    w = rows(num_classes, dim, 0)
    g = torch.Generator().manual_seed(1)
    features = torch.randn(3000, dim, generator=g) * torch.logspace(0.3, -0.7, dim) @ rotation(dim, 2).float()
    logits = features @ w.float().T
    start = frames.nearest(w)
    scale = least_squares_scale(w, start)
    found, factor = turned(start, scale, features, logits)
    torch.testing.assert_close(found @ found.T, start @ start.T, atol=1e-7, rtol=0)
    before, after = divergence(start, scale, features, logits), divergence(found, factor, features, logits)
    assert after < 0.8 * before
    # No small turn of it, and no other scale, is better by more than a little.
    for seed in range(20):
        skew = torch.randn(dim, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        turn = torch.linalg.matrix_exp(0.05 * (skew - skew.T) / dim**0.5)
        assert divergence(found @ turn, factor, features, logits) > after - 0.01 * before
    for other in (0.8, 1.25):
        assert divergence(found, other * factor, features, logits) > after - 0.01 * before
    again, same = turned(start, scale, features, lambda h: h @ w.float().T)
    torch.testing.assert_close(again, found, atol=1e-4, rtol=0)
    assert same == pytest.approx(factor, rel=1e-3)


def test_a_frame_that_says_all_of_it_stays() -> None:
    w = frames.simplex(6, 20, seed=1)
    features = torch.randn(200, 20, generator=torch.Generator().manual_seed(0))
    found, scale = turned(w, 2.0, features, 2 * features @ w.float().T)
    torch.testing.assert_close(found, w, atol=1e-2, rtol=0)
    assert scale == pytest.approx(2, rel=1e-2)


@given(SIMPLEX, SEEDS, st.floats(0.01, 100))
@settings(deadline=None, max_examples=20)
def test_a_simplex_is_its_own_nearest(shape: tuple[int, int], seed: int, scale: float) -> None:
    w = frames.simplex(*shape, seed=seed)
    found = frames.nearest(scale * w)
    torch.testing.assert_close(found, w, atol=1e-8, rtol=0)
    assert mean_cosine(scale * w, found) == pytest.approx(1)
    assert least_squares_scale(scale * w, found) == pytest.approx(scale)


@pytest.mark.parametrize(("num_classes", "dim"), [(60, 40), (90, 40), (200, 24)])
def test_where_none_fits_rows_are_pushed_apart_as_far_as_stated_and_no_others(num_classes: int, dim: int) -> None:
    w = rows(num_classes, dim, 0)
    found = frames.nearest(w)
    best = frames.coherence(frames.make("auto", num_classes, dim))
    assert best < frames.coherence(found) <= best + SLACK + 1e-9 < frames.coherence(w - w.mean(0))
    torch.testing.assert_close(found.norm(dim=1), torch.ones(num_classes, dtype=torch.float64))
    assert mean_cosine(w, found) > mean_cosine(w, frames.make("auto", num_classes, dim)) + 0.3
    # Vectors that are far enough apart already stay where they are.
    apart = frames.make("auto", num_classes, dim)
    apart = apart - apart.mean(0)
    torch.testing.assert_close(frames.nearest(apart), torch.nn.functional.normalize(apart, dim=1), atol=0.02, rtol=0)


def test_equal_rows_are_pushed_apart_too() -> None:
    w = rows(40, 16, 0).repeat(2, 1)
    found = frames.nearest(w)
    assert frames.coherence(found) <= frames.coherence(frames.make("auto", 80, 16)) + SLACK + 1e-9
    assert mean_cosine(w, found) > mean_cosine(w, frames.make("auto", 80, 16)) + 0.3


@pytest.mark.parametrize(("num_classes", "dim"), [(20, 64), (100, 512), (1000, 256)])
def test_directions_that_no_training_has_moved_are_known(num_classes: int, dim: int) -> None:
    fresh = torch.nn.Linear(dim, num_classes).weight
    assert looks_random(fresh)
    assert looks_random(torch.nn.init.trunc_normal_(torch.empty(num_classes, dim), std=0.02))
    assert not looks_random(frames.make("auto", num_classes, dim))
    assert not looks_random(rows(num_classes, dim, 0))
    assert not looks_random(fresh[:5])  # which cannot be told


def test_what_is_no_classifier_is_refused() -> None:
    with pytest.raises(UsageError, match="not finite"):
        frames.nearest(torch.full((3, 4), math.nan))
    with pytest.raises(UsageError, match="all alike"):
        frames.nearest(torch.ones(3, 4))
    with pytest.raises(UsageError, match=r"\[K, d\]"):
        frames.nearest(torch.zeros(6))
    with pytest.raises(UsageError, match="at least 2 classes"):
        frames.nearest(torch.zeros(1, 4))


@given(st.integers(2, 12), st.integers(1, 8), SEEDS)
@settings(deadline=None, max_examples=30)
def test_a_frame_of_means_turns_with_them_and_follows_the_classes(num_classes: int, dim: int, seed: int) -> None:
    means, q = rows(num_classes, dim, seed), rotation(dim, seed)
    found = frames.from_means(means)
    assert found.norm(dim=1).tolist() == pytest.approx([1.0] * num_classes)
    order = torch.randperm(num_classes, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(frames.from_means(3.0 * means @ q + 5.0), found @ q, atol=1e-8, rtol=0)
    torch.testing.assert_close(frames.from_means(means[order]), found[order], atol=1e-8, rtol=0)
    if num_classes <= dim + 1:
        assert frames.is_simplex(found)
    else:  # each along its own mean, by a loop
        centre = sum(means) / num_classes
        expected = [(m - centre) / math.sqrt(sum((m - centre) ** 2)) for m in means]
        torch.testing.assert_close(found, torch.stack(expected))


def test_means_that_make_no_frame() -> None:
    with pytest.raises(UsageError, match="class means are all alike, or one is their mean"):
        frames.from_means(torch.tensor([[1.0], [0.0], [2.0]]))
    with pytest.raises(UsageError, match="class means are not finite"):
        frames.from_means(torch.tensor([[1.0, torch.nan], [0.0, 1.0]]))
