"""The whole regularisation path beside scikit-learn in a loop, on the same data and cores, in one run.

    OMP_NUM_THREADS=2 python tests/benchmarks/regularisation_path.py

Prints the seconds, their ratio, and over the 45 strengths the largest excess of our mean objective over scikit-learn's
and the largest difference of the test accuracies. scikit-learn runs with its default tolerance on the same float32
features.
"""

import time
import warnings

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from timm_etf.transfer import logistic_path
from timm_etf.transfer.probe import STRENGTHS, standardised


def data(n: int, dim: int, classes: int, spread: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Gaussian classes with a spectrum that falls like 1 / rank, as features have, in a rotated basis."""
    shared = np.random.default_rng(0)
    scale = np.arange(1, dim + 1) ** -0.5
    centres = 0.9 * shared.normal(size=(classes, dim)) * scale
    basis = np.linalg.qr(shared.normal(size=(dim, dim)))[0]
    rng = np.random.default_rng(seed)
    y = np.arange(n) % classes
    x = centres[y] + spread * rng.normal(size=(n, dim)) * scale
    return (x @ basis).astype(np.float32), y


def objective(x: np.ndarray, y: np.ndarray, weights: np.ndarray, strength: float) -> float:
    logits = x.astype(np.float64) @ weights[:, :-1].T + weights[:, -1]
    top = logits.max(1)
    loss = np.log(np.exp(logits - top[:, None]).sum(1)) + top - logits[np.arange(len(y)), y]
    return loss.mean() + strength / 2 / len(y) * (weights[:, :-1] ** 2).sum()


def compare(n: int, dim: int, classes: int, spread: float) -> None:
    (x, y), (x_test, y_test) = data(n, dim, classes, spread, 1), data(4000, dim, classes, spread, 2)
    x, x_test = (standardised(a, x, device="cpu").numpy() for a in (x, x_test))
    started = time.perf_counter()
    path = logistic_path(torch.from_numpy(x), torch.from_numpy(y), classes, STRENGTHS).double().numpy()
    ours = time.perf_counter() - started
    theirs, excess, accuracies = 0.0, [], []
    for strength, weights in zip(STRENGTHS, path, strict=True):
        started = time.perf_counter()
        model = LogisticRegression(C=1 / strength, max_iter=10_000).fit(x, y)
        theirs += time.perf_counter() - started
        reference = np.column_stack([model.coef_, model.intercept_]).astype(np.float64)
        excess.append(objective(x, y, weights, strength) - objective(x, y, reference, strength))
        accuracies.append(
            [((x_test @ w[:, :-1].T + w[:, -1]).argmax(1) == y_test).mean() * 100 for w in (weights, reference)]
        )
    a, b = np.array(accuracies).T
    print(
        f"{n} x {dim}, {classes} classes, spread {spread}: path {ours:.1f} s, scikit-learn {theirs:.1f} s, "
        f"ratio {theirs / ours:.1f}; objective at most {max(excess):+.1e} above, at best {min(excess):+.1e}; accuracy "
        f"{b.min():.1f} to {b.max():.1f} %, best of path {a.max():.2f} and {b.max():.2f}, differs by at most "
        f"{np.abs(a - b).max():.2f} points (by {np.median(np.abs(a - b)):.2f} in the median)",
        flush=True,
    )


if __name__ == "__main__":
    warnings.simplefilter("ignore", ConvergenceWarning)
    compare(5_000, 2048, 100, 1.0)
    compare(5_000, 2048, 100, 2.5)
    compare(20_000, 512, 10, 2.0)
    compare(20_000, 512, 10, 6.0)
