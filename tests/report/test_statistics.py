import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from timm_etf.report.statistics import bootstrap, in_quadrature, percentiles, t_interval
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
    assert 0 <= low <= got.accuracy("mean_per_class") + 1e-4
    assert got.accuracy("mean_per_class") - 1e-4 <= high <= 100


def test_what_no_resample_can_change_has_no_width() -> None:
    y = np.repeat([0, 3], [90, 10])
    right, first = np.ones(100), (y == 0).astype(float)
    assert result(right, y).interval("mean_per_class") == (100, 100)
    assert result(first, y).interval("mean_per_class") == (50, 50)  # one class right, one wrong
    assert paired_difference(result(0 * right, y), result(right, y), "mean_per_class") == (100, (100, 100))


def test_the_interval_of_a_mean_per_class_is_scipys_of_the_mean_of_the_classes() -> None:
    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(4), [20, 238, 60, 35])
    correct = rng.random(len(y)) < np.array([0.5, 0.9, 0.7, 0.95])[y]

    def mean_of_classes(*samples: np.ndarray, axis: int = -1) -> np.ndarray:
        return 100 * np.mean([s.mean(axis=axis) for s in samples], axis=0)

    classes = [correct[y == k].astype(float) for k in range(4)]
    theirs = stats.bootstrap(
        classes, mean_of_classes, n_resamples=20_000, method="percentile", vectorized=True, rng=rng
    ).confidence_interval
    assert result(correct, y).interval("mean_per_class", draws=20_000) == pytest.approx(tuple(theirs), abs=0.3)
    # In any order of the images.
    order = rng.permutation(len(y))
    assert result(correct[order], y[order]).interval("mean_per_class") == result(correct, y).interval("mean_per_class")


def test_the_interval_of_a_mean_per_class_covers_and_is_no_wider_than_it_need_be() -> None:
    """Test sets drawn again and again, with the class sizes of a real target."""
    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(20), rng.integers(20, 238, 20))
    p = rng.uniform(0.85, 1, 20)
    accuracies, covered, widths = [], [], []
    for repeat in range(300):
        drawn = result(rng.random(len(y)) < p[y], y)
        low, high = drawn.interval("mean_per_class", draws=500, seed=repeat)
        accuracies.append(drawn.accuracy("mean_per_class"))
        covered.append(low <= 100 * p.mean() <= high)
        widths.append(high - low)
    assert np.mean(covered) == pytest.approx(0.95, abs=0.045)
    assert np.mean(widths) == pytest.approx(2 * 1.96 * np.std(accuracies), rel=0.12)


@given(st.floats(-10, 10), st.lists(st.floats(0, 10), min_size=4, max_size=4))
def test_intervals_in_quadrature(estimate: float, distances: list[float]) -> None:
    a, b, c, d = distances
    one, other = (estimate - a, estimate + b), (estimate - c, estimate + d)
    low, high = in_quadrature(estimate, one, other)
    assert (low, high) == in_quadrature(estimate, other, one)
    assert low <= min(one[0], other[0]) + 1e-9  # never narrower than either, never wider than both together
    assert high >= max(one[1], other[1]) - 1e-9
    assert estimate - a - c - 1e-9 <= low
    assert high <= estimate + b + d + 1e-9
    assert in_quadrature(estimate, one, (estimate, estimate)) == pytest.approx(one, abs=1e-9)


def test_percentiles() -> None:
    assert percentiles(np.arange(2001) / 20) == pytest.approx((2.5, 97.5))
