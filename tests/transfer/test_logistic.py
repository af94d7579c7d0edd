import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

from tests.transfer.conftest import blobs
from timm_etf.transfer import logistic_path

STRENGTHS = [1e3, 3e1, 1.0, 3e-2, 1e-3]


def objective(x: np.ndarray, y: np.ndarray, w: np.ndarray, b: np.ndarray, strength: float) -> float:
    logits = x @ w.T + b
    top = logits.max(axis=1)
    log_z = np.log(np.exp(logits - top[:, None]).sum(axis=1)) + top
    return (log_z - logits[np.arange(len(y)), y]).sum() + strength / 2 * (w**2).sum()


@pytest.mark.parametrize(("n", "dim", "classes"), [(300, 20, 4), (60, 150, 5), (200, 3, 2)])
def test_the_path_is_scikit_learns_at_every_strength(n: int, dim: int, classes: int) -> None:
    data = blobs(n, 1, classes, dim)
    x = data.x.astype(np.float64) - data.x.mean(0)
    path = logistic_path(torch.from_numpy(x), torch.from_numpy(data.y), classes, STRENGTHS, tolerance=1e-10).numpy()
    for strength, weights in zip(STRENGTHS, path, strict=True):
        theirs = LogisticRegression(C=1 / strength, tol=1e-9, max_iter=100_000).fit(x, data.y)
        w, b = theirs.coef_, theirs.intercept_
        if classes == 2:  # they keep one vector, half of whose length has either sign in the symmetric form
            w, b = np.concatenate([-w, w]) / 2, np.concatenate([-b, b]) / 2
            reference = objective(x, data.y, w, b, strength)
            assert objective(x, data.y, weights[:, :-1], weights[:, -1], strength) <= reference * (1 + 1e-6)
            continue
        ours = objective(x, data.y, weights[:, :-1], weights[:, -1], strength)
        assert ours == pytest.approx(objective(x, data.y, w, b, strength), rel=1e-6)
        np.testing.assert_allclose(weights[:, :-1], w, atol=2e-3 * np.abs(w).max())
        assert ((x @ weights[:, :-1].T + weights[:, -1]).argmax(1) == theirs.predict(x)).all()


def test_float32_with_the_default_tolerance_classifies_alike() -> None:
    data, test = blobs(600, 1, 10, 40), blobs(600, 2, 10, 40)
    mean = data.x.mean(0)
    strengths = np.logspace(-6, 5, 45)
    path = logistic_path(torch.from_numpy(data.x - mean), torch.from_numpy(data.y), 10, strengths.tolist())
    for strength, weights in list(zip(strengths, path.double().numpy(), strict=True))[::6]:
        theirs = LogisticRegression(C=1 / strength, tol=1e-8, max_iter=100_000)
        theirs.fit((data.x - mean).astype(np.float64), data.y)
        ours = ((test.x - mean) @ weights[:, :-1].T + weights[:, -1]).argmax(1)
        assert abs((ours == test.y).mean() - theirs.score(test.x - mean, test.y)) <= 0.01
        least = objective(data.x - mean, data.y, theirs.coef_, theirs.intercept_, strength)
        gap = objective(data.x - mean, data.y, weights[:, :-1], weights[:, -1], strength) - least
        assert gap / len(data.y) <= 3e-3 * max(least / len(data.y), 0.1)


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(4, 60),
    dim=st.integers(1, 40),
    classes=st.integers(2, 6),
    seed=st.integers(0, 100),
    low=st.floats(-3, 3),
)
def test_the_gradient_vanishes_at_every_solution(n: int, dim: int, classes: int, seed: int, low: float) -> None:
    rng = np.random.default_rng(seed)
    x, y = torch.from_numpy(rng.normal(size=(n, dim))), torch.from_numpy(rng.integers(0, classes, n))
    strengths = [10**low, 10 ** (low + 1)]
    for strength, weights in zip(strengths, logistic_path(x, y, classes, strengths, tolerance=1e-12), strict=True):
        w = weights.clone().requires_grad_()
        loss = torch.nn.functional.cross_entropy(x @ w[:, :-1].T + w[:, -1], y, reduction="sum")
        (loss + strength / 2 * w[:, :-1].square().sum()).backward()
        # A class without samples has its bias pushed away for ever; everything else is at rest.
        seen = torch.bincount(y, minlength=classes) > 0
        assert w.grad[seen].abs().max() < 1e-3 * n


def test_it_solves_in_the_order_asked_and_does_not_depend_on_the_rest_of_the_path() -> None:
    data = blobs(200, 1)
    x, y = torch.from_numpy(data.x.astype(np.float64)), torch.from_numpy(data.y)
    up = logistic_path(x, y, 4, [0.1, 1.0, 10.0], tolerance=1e-12)
    down = logistic_path(x, y, 4, [10.0, 0.1], tolerance=1e-12)
    torch.testing.assert_close(up[[2, 0]], down, atol=1e-5, rtol=1e-4)
    assert up[0, :, :-1].norm() > up[1, :, :-1].norm() > up[2, :, :-1].norm()


def test_one_strength_alone_arrives_where_the_path_does() -> None:
    # Rarely active, heavy-tailed features: a Newton step from zero lands where probabilities are 0 and 1, and there a
    # line search once gave up a whole nat above the solution.
    rng = np.random.default_rng(0)
    y = np.arange(1500) % 38
    x = np.maximum(rng.normal(size=(38, 256))[y] + rng.normal(size=(1500, 256)) - 3, 0)
    x = ((x - x.mean(0)) / x.std(0)).astype(np.float32)
    for strength in (30.0, 0.3, 3e-3):
        theirs = LogisticRegression(C=1 / strength, tol=1e-6, max_iter=20_000).fit(x, y)
        least = objective(x, y, theirs.coef_, theirs.intercept_, strength) / len(y)
        [weights] = logistic_path(torch.from_numpy(x), torch.from_numpy(y), 38, [strength]).double().numpy()
        gap = objective(x, y, weights[:, :-1], weights[:, -1], strength) / len(y) - least
        assert gap <= 0.02 * max(least, 0.1), strength
