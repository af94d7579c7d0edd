import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import commands
from timm_etf import UsageError, frames
from timm_etf.geometry import ClassMoments, class_covariance, collapse, covariance_differences, merged, spectrum
from timm_etf.geometry.metrics import CollapseMetrics, NearestMeanAgreement

DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def by_definition(x: np.ndarray, y: np.ndarray, weight: np.ndarray | None = None) -> dict[str, float]:
    """Every metric in two passes, with a loop over classes and dense matrices, from the papers' formulas."""
    classes = [int(k) for k in np.unique(y)]
    n, d, k = len(x), x.shape[1], len(classes)
    means = np.array([x[y == c].mean(0) for c in classes])
    share = np.array([np.mean(y == c) for c in classes])
    variance = np.array([np.square(x[y == c] - m).sum(1).mean() for c, m in zip(classes, means, strict=True)])
    s_w = sum((x[y == c] - m).T @ (x[y == c] - m) for c, m in zip(classes, means, strict=True)) / n
    centre = x.mean(0)
    s_b = sum(p * np.outer(m - centre, m - centre) for p, m in zip(share, means, strict=True))
    pairs = [(i, j) for i in range(k) for j in range(k) if i != j]
    m = means - means.mean(0)
    norms = np.linalg.norm(m, axis=1)
    cosines = np.array([m[i] @ m[j] / norms[i] / norms[j] for i, j in pairs])
    rank = np.linalg.matrix_rank(s_b, tol=1e-12)

    def effective_rank(s: np.ndarray) -> float:
        p = np.linalg.eigvalsh(s)
        p = p[p > 1e-13] / p[p > 1e-13].sum()
        return float(np.exp(-(p * np.log(p)).sum()))

    found = {
        "nc1": np.trace(s_w @ np.linalg.pinv(s_b, rcond=1e-12)) / k,
        "nc1_quotient": np.trace(s_w) / np.trace(s_b),
        "nc2_equinorm": norms.std() / norms.mean(),
        "nc2_equiangularity": cosines.std(),
        "nc2_simplex": np.abs(cosines + 1 / (k - 1)).mean(),
        "cdnv": np.mean([(variance[i] + variance[j]) / 2 / np.square(means[i] - means[j]).sum() for i, j in pairs]),
        "vci": 1 - np.trace(np.linalg.pinv(s_w + s_b, rcond=1e-12) @ s_b) / rank,
        "within": np.trace(s_w) / d,
        "feature_norm": np.linalg.norm(x, axis=1).mean(),
        "effective_rank_within": effective_rank(s_w),
        "effective_rank_between": effective_rank(s_b),
    }
    if weight is not None:
        w = weight[classes]
        found["nc3"] = np.square(m / np.linalg.norm(m) - w / np.linalg.norm(w)).sum()
    return {name: float(value) for name, value in found.items()}


@st.composite
def labelled(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, int]:
    """Features far from the origin or near it; classes of very different sizes, some of one sample, some of none."""
    num_classes, dim = draw(st.integers(3, 8)), draw(st.integers(2, 12))
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    sizes = np.array([draw(st.sampled_from([0, 1, 2, 9, 60])) for _ in range(num_classes)])
    sizes[rng.permutation(num_classes)[:3]] = (5, 20, 1)
    y = rng.permutation(np.repeat(np.arange(num_classes), sizes))
    x = rng.normal(size=(num_classes, dim))[y] + draw(st.sampled_from([1.0, 0.1])) * rng.normal(size=(len(y), dim))
    return x + draw(st.sampled_from([0.0, 30.0])), y, num_classes


@settings(max_examples=150, deadline=None)
@given(labelled(), st.sampled_from(DTYPES), st.integers(1, 70))
def test_every_metric_is_its_definition(
    sample: tuple[np.ndarray, np.ndarray, int], dtype: torch.dtype, batch: int
) -> None:
    x, y, num_classes = sample
    x_ND, y_N = torch.from_numpy(x).to(dtype), torch.from_numpy(y)
    weight = torch.randn(num_classes, x.shape[1], generator=torch.Generator().manual_seed(0))
    metric = CollapseMetrics(num_classes, x.shape[1], weight)
    for at in range(0, len(y), batch):
        metric.update(x_ND[at : at + batch], y_N[at : at + batch])
    got = metric.compute()
    # A direction with almost nothing in it decides a pseudo-inverse: the tolerance is that of its cut.
    assert got == pytest.approx(by_definition(x_ND.double().numpy(), y, weight.double().numpy()), rel=1e-4, abs=1e-7)


@settings(max_examples=50, deadline=None)
@given(labelled(), st.integers(0, 1000), st.integers(1, 4))
def test_order_and_division_do_not_matter(sample: tuple[np.ndarray, np.ndarray, int], seed: int, parts: int) -> None:
    x, y, num_classes = sample
    whole = collapse(ClassMoments.of(x, y, num_classes))
    order = np.random.default_rng(seed).permutation(len(y))
    pieces = [ClassMoments.of(x[i], y[i], num_classes) for i in np.array_split(order, parts)]
    assert collapse(merged(pieces)) == pytest.approx(whole, rel=1e-7, abs=1e-9)
    # forward() of a metric gives the batch's value and leaves the sum of all
    metric = CollapseMetrics(num_classes, x.shape[1])
    for i in np.array_split(order, parts):
        assert metric(torch.from_numpy(x[i]), torch.from_numpy(y[i]))["feature_norm"] == pytest.approx(
            np.linalg.norm(x[i], axis=1).mean()
        )
    assert metric.compute() == pytest.approx(whole, rel=1e-7, abs=1e-9)


def test_one_pass_is_as_exact_as_two_far_from_the_origin() -> None:
    rng = np.random.default_rng(0)
    y = rng.integers(0, 4, 400)
    near = rng.normal(size=(4, 6))[y] + 1e-3 * rng.normal(size=(400, 6))
    far = near + 1e6  # sums of squares about the origin would keep four digits of 16 of what is within the classes
    got = ClassMoments.empty(4, 6)
    for at in range(0, 400, 32):
        got.update(torch.from_numpy(far[at : at + 32]), torch.from_numpy(y[at : at + 32]))
    exact = far - 1e6
    assert collapse(got)["within"] == pytest.approx(by_definition(exact, y)["within"], rel=1e-6)
    assert collapse(got)["nc1"] == pytest.approx(by_definition(exact, y)["nc1"], rel=1e-6)


@pytest.mark.parametrize("batch", [7, 1000])
def test_exact_collapse_onto_a_simplex(batch: int) -> None:
    w_KD = 3 * frames.simplex(10, 32, seed=0)
    y = torch.arange(230) % 10
    x = (w_KD + 0.3)[y]
    metric = CollapseMetrics(10, 32, w_KD)
    for at in range(0, 230, batch):
        metric.update(x[at : at + batch], y[at : at + batch])
    got = metric.compute()
    assert got["nc1"] == got["nc1_quotient"] == got["cdnv"] == got["within"] == 0.0
    for name in ("nc2_equinorm", "nc2_equiangularity", "nc2_simplex", "nc3", "vci"):
        assert got[name] == pytest.approx(0, abs=1e-12), name
    assert got["effective_rank_between"] == pytest.approx(9)
    assert collapse(metric.moments(), -w_KD)["nc3"] == pytest.approx(4)
    shrunk = w_KD.clone()
    shrunk[0] *= 2
    assert collapse(ClassMoments.of(shrunk, torch.arange(10)))["nc2_equinorm"] > 0.1


def test_pairs_of_many_classes_are_taken_in_blocks() -> None:
    rng = np.random.default_rng(0)
    y = rng.permutation(np.repeat(np.arange(1100), 2))
    x = rng.normal(size=(1100, 4))[y] + 0.1 * rng.normal(size=(2200, 4))
    expected = by_definition(x, y)
    got = collapse(ClassMoments.of(x, y))
    for name in ("nc2_equinorm", "nc2_equiangularity", "nc2_simplex", "cdnv"):
        assert got[name] == pytest.approx(expected[name], rel=1e-7), name


def test_a_gaussian_mixture_recovers_its_covariance() -> None:
    rng = np.random.default_rng(0)
    root = rng.normal(size=(8, 8)) / 3
    y = rng.integers(0, 5, 40_000)
    x = rng.normal(size=(5, 8))[y] + rng.normal(size=(40_000, 8)) @ root
    moments = ClassMoments.of(x.astype(np.float32), y)
    assert class_covariance(moments).numpy() == pytest.approx(root.T @ root, abs=0.03)
    assert collapse(moments)["within"] == pytest.approx(np.trace(root.T @ root) / 8, rel=0.01)
    expected = np.linalg.eigvalsh(root.T @ root)[::-1]
    assert spectrum(class_covariance(moments)).numpy() == pytest.approx(expected, rel=0.05, abs=0.01)


def test_covariance_differences_are_those_of_the_mixture() -> None:
    # Averaged over draws the estimates are the truth, that of the diagonal of T, too.
    rng, d, n = np.random.default_rng(0), 12, 20
    roots = [s * rng.normal(size=(d, d)) / d for s in (1.0, 1.5, 0.5)]
    covariances = [r.T @ r for r in roots]
    found = []
    for _ in range(300):
        x = np.concatenate([rng.normal(size=(n, d)) @ r for r in roots])
        found.append(covariance_differences(x, np.repeat(np.arange(3), n), 3))
    t, square = (torch.stack(v).mean(0).numpy() for v in zip(*found, strict=True))
    traces = np.array([np.trace(c) for c in covariances])
    assert t == pytest.approx((traces - traces.mean()) * d**0.5, abs=0.1)
    truth = np.array([[d * np.trace(a @ b) for a in covariances] for b in covariances])
    assert square == pytest.approx(truth, rel=0.05)
    t, square = covariance_differences(np.eye(4)[[0, 1, 2, 3, 0]], np.array([0, 0, 0, 1, 1]), 3)
    assert t.isfinite().tolist() == [True, True, False]  # the last has no sample
    assert square.isfinite().diag().tolist() == [True, False, False]  # the second has two


def test_what_has_no_answer_says_so() -> None:
    x, y = np.eye(4)[[0, 0, 1, 1, 2, 2]], np.array([7, 7, 2, 2, 3, 3])
    assert np.isnan(collapse(ClassMoments.of(x, np.zeros(6, np.int64)))["nc1"])
    assert collapse(ClassMoments.of(np.ones((4, 3)), np.array([0, 0, 1, 1])))["nc1"] == np.inf
    with pytest.raises(UsageError, match="no sample"):
        collapse(ClassMoments.empty(3, 4))
    with pytest.raises(UsageError, match="from 2 to 7 do not fit 5 classes"):
        ClassMoments.of(x, y, 5)
    with pytest.raises(UsageError, match=r"belong here, not \[6, 4\], \[5\]"):
        ClassMoments.of(x, y[:5], 8)
    with pytest.raises(UsageError, match="not finite"):
        collapse(ClassMoments.of(np.where(x > 0, np.nan, x), y))
    with pytest.raises(UsageError, match="weight of shape"):
        collapse(ClassMoments.of(x, y), torch.eye(4))


def test_means_that_span_one_direction_have_rank_one() -> None:
    # Rounding gives two class means, or three on a line, a second direction of size 1e-17: it must not be divided by.
    rng = np.random.default_rng(0)
    for seed in range(200):
        y = np.arange(60) % (2 + seed % 2)
        x = y[:, None] * rng.normal(size=2) + rng.normal(size=2) * 1e3
        x += np.tile(rng.normal(size=(10, 1, 2)), (1, 6, 1)).reshape(60, 2)  # the same within every class
        assert collapse(ClassMoments.of(x, y))["nc1"] < 1e6


def test_nearest_means() -> None:
    rng = np.random.default_rng(0)
    y = rng.integers(0, 6, 300)
    x = (rng.normal(size=(6, 5))[y] + rng.normal(size=(300, 5)) + 20).astype(np.float32)
    train = ClassMoments.of(x[y != 4], y[y != 4], num_classes=7)  # classes 4 and 6 have no mean
    distances = np.stack(
        [np.square(x - x[y == k].mean(0)).sum(1) if k not in (4, 6) else np.full(300, np.inf) for k in range(7)]
    )
    logits = rng.normal(size=(300, 7))
    metric = NearestMeanAgreement(train)
    for at in range(0, 300, 50):
        metric.update(torch.from_numpy(x[at : at + 50]), torch.from_numpy(logits[at : at + 50].argmax(1)))
    assert metric.compute().item() == pytest.approx((distances.argmin(0) == logits.argmax(1)).mean())
    with pytest.raises(UsageError, match="no sample"):
        NearestMeanAgreement(ClassMoments.empty(2, 2))


TWO = """
import json, sys
import numpy as np, torch, torch.distributed as dist
from timm_etf.geometry import ClassMoments
from timm_etf.geometry.metrics import CollapseMetrics, NearestMeanAgreement
dist.init_process_group("gloo")
data = np.load(sys.argv[1])
rank = dist.get_rank()
mine = slice(0, 37) if rank == 0 else slice(37, None)  # shares of different sizes, one without some classes
x, y = torch.from_numpy(data["x"]), torch.from_numpy(data["y"])
metric, agree = CollapseMetrics(8, x.shape[1]), NearestMeanAgreement(ClassMoments.of(x, y, 8))
for a, b in zip(x[mine].split(16), y[mine].split(16)):
    metric.update(a, b), agree.update(a, b)
found = metric.compute(), agree.compute().item()
if rank == 0:
    print(json.dumps(found))
metric.update(x[mine][:3], y[mine][:3])  # and goes on
assert metric.count.shape == (8,)
dist.destroy_process_group()
"""


def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    y = np.sort(rng.integers(0, 7, 150))
    x = (rng.normal(size=(7, 9))[y] + rng.normal(size=(150, 9))).astype(np.float32)
    np.savez(tmp_path / "data.npz", x=x, y=y)
    done, _ = commands.run_ranks(2, tmp_path / "data.npz", code=TWO)
    found, agreement = json.loads(done.stdout.strip().splitlines()[-1])
    assert found == pytest.approx(by_definition(x.astype(np.float64), y), rel=1e-6)
    one = NearestMeanAgreement(ClassMoments.of(x, y, 8))
    assert agreement == one(torch.from_numpy(x), torch.from_numpy(y)).item()
