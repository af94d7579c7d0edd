"""Measures of mistakes, each against a loop over samples in float64."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from timm_etf import UsageError, geometry
from timm_etf.frames import ClassTree
from timm_etf.geometry import mistakes


def drawn(num_classes: int, count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, features, labels and a tree's distances."""
    g = torch.Generator().manual_seed(seed)
    paths = tuple(f"{i % 3}/{i % 5}/{i}" if i % 4 else f"{i % 2}/{i}" for i in range(num_classes))
    labels = torch.randint(num_classes, (count,), generator=g)
    logits = torch.randn(count, num_classes, generator=g, dtype=torch.float64)
    features = torch.randn(count, 6, generator=g, dtype=torch.float64) + labels[:, None] % 3
    return logits, features, labels, ClassTree(paths).distance


CASES = (st.integers(2, 12), st.integers(2, 40), st.integers(0, 2**31))


@given(*CASES, st.integers(1, 12))
@settings(deadline=None, max_examples=30)
def test_rankings(num_classes: int, count: int, seed: int, k: int) -> None:
    logits, _, labels, d = drawn(num_classes, count, seed)
    k = min(k, num_classes)
    wrong, at_k, costs = [], [], np.zeros((count, num_classes))
    for i in range(count):
        order = sorted(range(num_classes), key=lambda j: -logits[i, j].item())
        if order[0] != labels[i]:
            wrong.append(d[order[0], labels[i]].item())
        at_k += [d[j, labels[i]].item() for j in order[:k]]
        p = np.exp(logits[i].numpy())
        p /= p.sum()
        for decided in range(num_classes):
            costs[i, decided] = sum(d[decided, j].item() * p[j] for j in range(num_classes))
    expected = np.mean(wrong) if wrong else math.nan
    assert geometry.severity(logits, labels, d) == pytest.approx(expected, abs=1e-12, nan_ok=True)
    assert geometry.distance_at(logits, labels, d, k) == pytest.approx(np.mean(at_k), abs=1e-12)
    assert np.abs(geometry.expected_cost(logits, d).numpy() - costs).max() < 1e-12
    # Of the decisions that the model's own probabilities weigh, none costs less.
    decided = geometry.expected_cost(logits, d).argmin(1)
    assert (costs[np.arange(count), decided] <= costs.min(1) + 1e-12).all()


def test_costs_of_two_kinds_of_mistakes_are_not_mixed_up() -> None:
    d = torch.tensor([[0.0, 1.0], [9.0, 0.0]])  # deciding 1 where 0 is right costs 9
    assert geometry.expected_cost(torch.tensor([[0.3, 0.7]]).log(), d)[0].tolist() == pytest.approx([0.7, 2.7])
    assert geometry.severity(torch.tensor([[0.0, 1.0]]), torch.tensor([0]), d) == 9
    assert geometry.distance_at(torch.tensor([[0.0, 1.0]]), torch.tensor([0]), d, 1) == 9


def loop_precision(x: np.ndarray, y: np.ndarray, d: np.ndarray, k: int) -> float:
    found = []
    for i in range(len(x)):
        others = [j for j in range(len(x)) if j != i]
        near = sorted(others, key=lambda j: -(x[i] @ x[j]) / np.linalg.norm(x[i]) / np.linalg.norm(x[j]))
        s = [1 - d[y[i], y[j]] / d.max() for j in near]
        best = sorted(s, reverse=True)
        if best[0] > 0:
            ns = range(1, min(k, len(others)) + 1)
            found.append(np.mean([sum(s[:n]) / sum(best[:n]) for n in ns]))
    return float(np.mean(found)) if found else math.nan


def loop_siblings(x: np.ndarray, y: np.ndarray, d: np.ndarray, height: float) -> float:
    found = []
    for i in range(len(x)):
        others = [j for j in range(len(x)) if y[j] != y[i]]
        if any(d[y[i], y[j]] <= height for j in others):
            near = max(others, key=lambda j: (x[i] @ x[j]) / np.linalg.norm(x[i]) / np.linalg.norm(x[j]))
            found.append(d[y[i], y[near]] <= height)
    return float(np.mean(found)) if found else math.nan


@given(*CASES, st.sampled_from([1, 5, 250]), st.sampled_from([1.0, 2.0]))
@settings(deadline=None, max_examples=30)
def test_neighbours(num_classes: int, count: int, seed: int, k: int, height: float) -> None:
    _, x, y, d = drawn(num_classes, count, seed)
    arrays = x.numpy(), y.numpy(), d.numpy()
    for block in (7, 1024):  # samples at once
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(mistakes, "_BLOCK", block)
            precision = geometry.average_hierarchical_precision(x, y, d, k)
            siblings = geometry.sibling_neighbours(x, y, d, height)
        assert precision == pytest.approx(loop_precision(*arrays, k), abs=1e-9, nan_ok=True)
        assert siblings == pytest.approx(loop_siblings(*arrays, height), abs=1e-12, nan_ok=True)
    assert geometry.sibling_neighbours(5 * x.float(), y, d, height) == pytest.approx(siblings, nan_ok=True)


def test_what_does_not_fit_is_refused() -> None:
    logits, _, labels, d = drawn(5, 8, 0)
    for call, says in (
        (lambda: geometry.severity(logits[:, :4], labels, d), "of 4 classes and the distance of 5"),
        (lambda: geometry.severity(logits, labels + 3, d), "a class from 0 to 4"),
        (lambda: geometry.expected_cost(logits, d[:4]), r"distance \[K, K\]"),
        (lambda: geometry.distance_at(logits, labels, d, 6), "1 to 5, not 6"),
        (lambda: geometry.sibling_neighbours(logits[:1], labels[:1], d), "takes two samples"),
    ):
        with pytest.raises(UsageError, match=says):
            call()
