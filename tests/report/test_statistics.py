import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from timm_etf.report.statistics import bootstrap, t_interval
from timm_etf.transfer import Result, paired_difference


def result(correct: np.ndarray, y: np.ndarray | None = None) -> Result:
    return Result(correct.astype(np.float32), np.zeros(len(correct), np.int64) if y is None else y, "")


def test_the_paired_difference_is_paired() -> None:
    rng = np.random.default_rng(0)
    a = rng.random(2000) < 0.7
    b = a.copy()
    b[np.flatnonzero(~a)[:20]] = True  # one point better, on the same images
    mean, (low, high) = paired_difference(result(a), result(b))
    assert mean == pytest.approx(1.0)
    assert 0.5 < low < 1 < high < 1.5  # unpaired it would be about 1 +- 2.8
    se = 100 * (b.astype(float) - a).std() / 2000**0.5
    assert (high - low) == pytest.approx(2 * 1.96 * se, rel=0.15)


def test_the_bootstrap_is_that_of_picking_samples() -> None:
    values = np.random.default_rng(0).normal(size=50).round(1)
    picks = np.random.default_rng(1).integers(0, 50, size=(20_000, 50))
    for q in (2.5, 50, 97.5):
        theirs = np.percentile(values[picks].mean(1), q)
        assert np.percentile(bootstrap(values, 20_000), q) == pytest.approx(theirs, abs=0.02)


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=12))
def test_the_t_interval_is_scipys(values: list[float]) -> None:
    low, high = t_interval(values)
    sem = stats.sem(values)
    half = stats.t.ppf(0.975, len(values) - 1) * sem
    assert low == pytest.approx(np.mean(values) - half, rel=1e-5, abs=1e-6)
    assert high == pytest.approx(np.mean(values) + half, rel=1e-5, abs=1e-6)


def test_one_repetition_has_no_interval() -> None:
    assert t_interval([1.0]) is None


@given(st.integers(0, 1000))
def test_mean_per_class(seed: int) -> None:
    rng = np.random.default_rng(seed)
    y, correct = rng.choice([0, 2, 5], size=40, p=[0.7, 0.2, 0.1]), rng.random(40) < 0.6
    by_class = [correct[y == k].mean() for k in np.unique(y)]
    got = result(correct, y)
    assert got.accuracy("mean_per_class") == pytest.approx(100 * np.mean(by_class), abs=1e-4)
    assert got.accuracy("top1") == pytest.approx(100 * correct.mean(), abs=1e-4)
    low, high = got.interval("mean_per_class")
    assert low <= got.accuracy("mean_per_class") + 1e-9
    assert high >= got.accuracy("mean_per_class") - 1e-9
