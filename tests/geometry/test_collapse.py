import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from timm_etf.geometry import collapse


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 6), st.integers(1, 12), st.integers(0, 1000))
def test_against_the_definitions(num_classes: int, dim: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    y = np.concatenate([np.arange(num_classes), rng.integers(0, num_classes, 60)])
    x = rng.normal(size=(num_classes, dim))[y] + rng.normal(size=(len(y), dim))
    means = [x[y == k].mean(0) for k in range(num_classes)]
    share = [np.mean(y == k) for k in range(num_classes)]
    centre = x.mean(0)
    s_w = sum(np.outer(a - means[k], a - means[k]) for a, k in zip(x, y, strict=True)) / len(y)
    s_b = sum(p * np.outer(m - centre, m - centre) for p, m in zip(share, means, strict=True))
    variance = [np.square(x[y == k] - means[k]).sum(1).mean() for k in range(num_classes)]
    pairs = [
        (variance[i] + variance[j]) / 2 / np.square(means[i] - means[j]).sum()
        for i in range(num_classes)
        for j in range(num_classes)
        if i != j
    ]
    got = collapse(x.astype(np.float64), y)
    # A direction with almost nothing in it decides the pseudo-inverse: the tolerance is that of its cut.
    assert got["nc1"] == pytest.approx(np.trace(s_w @ np.linalg.pinv(s_b, rcond=1e-12)) / num_classes, rel=1e-4)
    assert got["cdnv"] == pytest.approx(np.mean(pairs), rel=1e-6)
    rank = np.linalg.matrix_rank(s_b, tol=1e-12)
    vci = 1 - np.trace(np.linalg.pinv(s_w + s_b, rcond=1e-12) @ s_b) / rank
    assert got["vci"] == pytest.approx(vci, abs=1e-6)
    assert got["within"] == pytest.approx(np.trace(s_w) / dim)


def test_points_are_collapsed_and_one_class_has_no_ratio() -> None:
    x, y = np.eye(4)[[0, 0, 1, 1, 2, 2]], np.array([7, 7, 2, 2, 3, 3])
    assert collapse(x, y) == pytest.approx({"nc1": 0, "cdnv": 0, "vci": 0, "within": 0}, abs=1e-12)
    assert np.isnan(collapse(x, np.zeros(6, np.int64))["nc1"])
    assert collapse(np.ones((4, 3)), np.array([0, 0, 1, 1]))["nc1"] == np.inf


def test_means_that_span_one_direction_have_rank_one() -> None:
    # Rounding gives two class means, or three on a line, a second direction of size 1e-17: it must not be divided by.
    rng = np.random.default_rng(0)
    for seed in range(200):
        y = np.arange(60) % (2 + seed % 2)
        x = y[:, None] * rng.normal(size=2) + rng.normal(size=2) * 1e3
        x += np.tile(rng.normal(size=(10, 1, 2)), (1, 6, 1)).reshape(60, 2)  # the same within every class
        assert collapse(x, y)["nc1"] < 1e6
