import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from timm_etf import frames


@given(st.integers(2, 40), st.integers(0, 30), st.integers(0, 2**31))
@settings(deadline=None)
def test_orthonormal_rows(num_classes: int, more: int, seed: int) -> None:
    w = frames.orthonormal(num_classes, num_classes + more, seed=seed).numpy()
    assert np.abs(w @ w.T - np.eye(num_classes)).max() < 1e-12


def sylvester(size: int) -> np.ndarray:
    h = np.ones((1, 1))
    while len(h) < size:
        h = np.block([[h, h], [h, -h]])
    return h


@given(st.integers(2, 80), st.integers(2, 80))
@settings(deadline=None)
def test_hadamard_is_sylvesters_matrix(num_classes: int, dim: int) -> None:
    most = 1 << (dim - 1).bit_length()
    if num_classes > most:
        return
    w = frames.hadamard(num_classes, dim).numpy()
    expected = sylvester(max(num_classes, dim))[:num_classes, :dim]
    assert np.abs(w - expected / np.sqrt(dim)).max() < 1e-12
    assert len(np.unique(np.sign(w), axis=0)) == num_classes


@given(st.integers(2, 200), st.integers(0, 20), st.integers(0, 2**31))
@settings(deadline=None)
def test_cube_has_the_cosines_of_hamming_distances(num_classes: int, more: int, seed: int) -> None:
    bits = max(1, (num_classes - 1).bit_length())
    w = frames.cube(num_classes, bits + more, seed=seed).numpy()
    distance = [[(i ^ j).bit_count() for j in range(num_classes)] for i in range(num_classes)]
    assert np.abs(w @ w.T - (1 - 2 * np.array(distance) / bits)).max() < 1e-12


def test_uniform_qr_is_the_published_recipe_and_not_haar() -> None:
    num_classes, dim = 100, 512
    w = frames.uniform_qr(num_classes, dim, seed=4)
    # Its defining formula in numpy, from the same draw.
    draw = torch.rand(dim, num_classes, generator=torch.Generator().manual_seed(4), dtype=torch.float64).numpy()
    u = np.linalg.qr(draw).Q
    centring = np.eye(num_classes) - np.ones((num_classes, num_classes)) / num_classes
    expected = np.sqrt(num_classes / (num_classes - 1)) * (u @ centring).T
    assert min(np.abs(w.numpy() - expected).max(), np.abs(w.numpy() + expected).max()) < 1e-12
    assert frames.is_simplex(w)
    constant = np.full(dim, dim**-0.5)
    assert np.linalg.norm(u.T @ constant) ** 2 > 0.99  # the trap: all but inside the span
    haar = np.linalg.qr(torch.randn(dim, num_classes, generator=torch.Generator().manual_seed(4)).numpy()).Q
    assert np.linalg.norm(haar.T @ constant) ** 2 < 0.3


@pytest.mark.parametrize(("num_classes", "dim"), [(1000, 192), (500, 2048), (5, 1)])
def test_gaussian_rows_are_unit_and_as_close_as_random_ones(num_classes: int, dim: int) -> None:
    w = frames.gaussian(num_classes, dim, seed=1)
    assert (w.norm(dim=1) - 1).abs().max() < 1e-12
    if dim > 1:
        assert frames.coherence(w) == pytest.approx((4 * np.log(num_classes) / dim) ** 0.5, rel=0.25)
