"""The whole regularisation path beside scikit-learn's solvers, on the same data and cores, in one run.

    OMP_NUM_THREADS=1 python tests/benchmarks/regularisation_path.py

Prints for every rival its CPU seconds and their ratio to ours, and over the 45 strengths the largest excess of our mean
objective over the rival's and the largest difference of the test accuracies. scikit-learn runs with its default
tolerance on the same float32 features: `lbfgs` from zero at every strength, and from strong to weak with each fit
started at the one before (`warm_start`); `newton-cholesky`, whose Hessian has (K (d + 1))^2 entries, where that is
small. A rival stops after a time limit; its ratio is then a lower bound.
"""

import time
import warnings

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from timm_etf.transfer import logistic_path
from timm_etf.transfer.probe import STRENGTHS


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


LIMIT = 40.0
"""Seconds for a rival; checked between strengths."""


def rivals(dim: int, classes: int) -> dict[str, LogisticRegression]:
    """scikit-learn's ways down the path."""
    found = {"lbfgs": LogisticRegression(max_iter=10_000), "lbfgs, warm": LogisticRegression(max_iter=10_000)}
    if classes * (dim + 1) <= 3_000:  # a Hessian of 72 MB
        found["newton-cholesky"] = LogisticRegression(max_iter=10_000, solver="newton-cholesky")
        found["newton-cholesky, warm"] = LogisticRegression(max_iter=10_000, solver="newton-cholesky")
    for name, model in found.items():
        model.set_params(warm_start=name.endswith("warm"))
    return found


def compare(n: int, dim: int, classes: int, spread: float) -> None:
    (x, y), (x_test, y_test) = data(n, dim, classes, spread, 1), data(4000, dim, classes, spread, 2)
    mean, deviation = x.mean(axis=0), x.std(axis=0)
    x, x_test = ((a - mean) / deviation for a in (x, x_test))
    strengths = sorted(STRENGTHS, reverse=True)
    started = time.process_time()
    path = logistic_path(torch.from_numpy(x), torch.from_numpy(y), classes, strengths).double().numpy()
    ours = time.process_time() - started
    print(f"{n} x {dim}, {classes} classes, spread {spread}: path {ours:.1f} s", flush=True)
    for name, model in rivals(dim, classes).items():
        seconds, excess, accuracies = 0.0, [], []
        for strength, weights in zip(strengths, path, strict=True):
            started = time.process_time()
            model.set_params(C=1 / strength).fit(x, y)
            seconds += time.process_time() - started
            theirs = np.column_stack([model.coef_, model.intercept_]).astype(np.float64)
            excess.append(objective(x, y, weights, strength) - objective(x, y, theirs, strength))
            right = [(x_test @ w[:, :-1].T + w[:, -1]).argmax(1) == y_test for w in (weights, theirs)]
            accuracies.append([100 * r.mean() for r in right])
            if seconds > LIMIT:
                break
        a, b = np.array(accuracies).T
        reached = "" if len(a) == len(path) else f" for the strongest {len(a)} of {len(path)}"
        print(
            f"  {name:<22}{seconds:6.1f} s{reached}, ratio {seconds / ours:.1f}; objective at most {max(excess):+.1e} "
            f"above, at best {min(excess):+.1e}; best accuracy of path {a.max():.2f} and {b.max():.2f}, differs by at "
            f"most {np.abs(a - b).max():.2f} points (by {np.median(np.abs(a - b)):.2f} in the median)",
            flush=True,
        )


if __name__ == "__main__":
    warnings.simplefilter("ignore", ConvergenceWarning)
    compare(5_000, 256, 10, 2.0)
    compare(10_000, 512, 10, 2.0)
    compare(10_000, 512, 10, 6.0)
    compare(3_000, 2048, 50, 1.0)
    compare(3_000, 2048, 50, 2.5)
