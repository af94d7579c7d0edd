import numpy as np
import pytest

from timm_etf.transfer import Features


def blobs(n: int, seed: int, num_classes: int = 4, dim: int = 20, spread: float = 1.0) -> Features:
    """Gaussian classes around fixed centres."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(0).normal(size=(num_classes, dim))
    y = np.arange(n) % num_classes
    x = (centres[y] + spread * rng.normal(size=(n, dim))).astype(np.float32)
    return Features(x, y, tuple(str(k) for k in range(num_classes)))


@pytest.fixture(scope="session")
def make_blobs() -> object:
    return blobs
