import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from timm_etf import UsageError, frames


def test_coherence_against_a_loop() -> None:
    w = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
    cosines = [
        float(torch.nn.functional.cosine_similarity(w[i].double(), w[j].double(), dim=0))
        for i in range(12)
        for j in range(i)
    ]
    assert frames.coherence(w) == pytest.approx(max(cosines), abs=1e-12)
    assert frames.coherence(w, absolute=True) == pytest.approx(max(map(abs, cosines)), abs=1e-12)
    with pytest.raises(UsageError, match="K >= 2"):
        frames.coherence(w[0])


def test_coherence_sees_pairs_in_different_blocks() -> None:
    w = torch.randn(2500, 64, generator=torch.Generator().manual_seed(0))
    expected = w.clone()
    for i, j in ((3, 2400), (1030, 1100), (2048, 2499)):
        w = expected.clone()
        w[j] = 2 * w[i]
        assert frames.coherence(w) == pytest.approx(1, abs=1e-12)


@given(st.integers(2, 60), st.integers(1, 30), st.integers(0, 2**31))
@settings(deadline=None)
def test_no_set_of_vectors_beats_a_bound(num_classes: int, dim: int, seed: int) -> None:
    w = frames.gaussian(num_classes, dim, seed=seed)
    for _ in range(20):  # a few steps of descent come nearer to the bounds than random vectors do
        cosines = (w @ w.T).fill_diagonal_(-2)
        w = torch.nn.functional.normalize(w - 0.1 * torch.softmax(20 * cosines, dim=1) @ w, dim=1)
    assert frames.coherence(w) >= frames.bound(num_classes, dim) - 1e-12
    assert frames.coherence(w) >= frames.levenshtein_bound(num_classes, dim) - 1e-12
    assert frames.coherence(w, absolute=True) >= frames.welch_bound(num_classes, dim) - 1e-12


@pytest.mark.parametrize(
    ("num_classes", "dim", "cosine"),
    [
        (12, 3, 1 / math.sqrt(5)),  # icosahedron
        (240, 8, 1 / 2),  # E8
        (196560, 24, 1 / 2),  # Leech lattice
        (27, 6, 1 / 4),  # Schlaefli
        (56, 7, 1 / 3),
        (552, 23, 1 / 5),
        (275, 22, 1 / 6),
        (4600, 23, 1 / 3),
        (7, 2, math.cos(2 * math.pi / 7)),
    ],
)
def test_levenshtein_is_met_by_the_codes_that_are_known_to_meet_it(num_classes: int, dim: int, cosine: float) -> None:
    assert frames.levenshtein_bound(num_classes, dim) == pytest.approx(cosine, abs=1e-9)


@given(st.integers(3, 2000), st.integers(2, 20000))
@settings(deadline=None)
def test_levenshtein_inverts_the_closed_forms(dim: int, num_classes: int) -> None:
    s = frames.levenshtein_bound(num_classes, dim)
    if num_classes <= dim + 1:
        assert s == -1 / (num_classes - 1)
    elif num_classes <= 2 * dim:
        assert 2 * dim * (1 - s) / (1 - dim * s) == pytest.approx(num_classes, rel=1e-6)
    elif num_classes <= dim * (dim + 3) / 2:
        assert dim * (1 - s) * (2 + (dim + 1) * s) / (1 - dim * s * s) == pytest.approx(num_classes, rel=1e-6)


def test_bounds_refuse_what_has_none() -> None:
    for function in (frames.bound, frames.rankin_bound, frames.welch_bound, frames.levenshtein_bound):
        with pytest.raises(UsageError, match="at least 2 classes"):
            function(1, 10)
