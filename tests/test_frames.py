import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from timm_etf import UsageError, frames


@st.composite
def shapes(draw: st.DrawFn) -> tuple[int, int]:
    num_classes = draw(st.integers(2, 60))
    return num_classes, draw(st.integers(num_classes - 1, num_classes + 70))


@given(shapes(), st.integers(0, 2**31))
@settings(deadline=None)
def test_simplex_is_the_simplex_etf(shape: tuple[int, int], seed: int) -> None:
    num_classes, dim = shape
    w = frames.simplex(num_classes, dim, seed=seed).numpy()
    # Independent of the construction: the defining Gram matrix, from the paper's formula with an explicit basis.
    gram = num_classes / (num_classes - 1) * (np.eye(num_classes) - 1 / num_classes)
    assert np.abs(w @ w.T - gram).max() < 1e-12
    assert np.abs(w.sum(axis=0)).max() < 1e-12
    assert frames.is_simplex(torch.from_numpy(w))
    assert frames.coherence(torch.from_numpy(w)) == pytest.approx(-1 / (num_classes - 1), abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision_is_the_rounded_frame(dtype: torch.dtype) -> None:
    w = frames.simplex(100, 128, seed=3, dtype=dtype)
    assert w.dtype == dtype
    assert w.is_contiguous()
    assert torch.equal(w, frames.simplex(100, 128, seed=3).to(dtype))
    assert frames.is_simplex(w)


def test_rotation_is_haar() -> None:
    # E[w w'] = I/d under the Haar measure, so no direction is special; the uniform [0, 1) draw of published code puts
    # the constant vector 99.9 % inside the span. Over 400 draws the mean squared cosine is 1/d within a few percent.
    dim, draws = 24, 400
    first = torch.stack([frames.simplex(5, dim, seed=s)[0] for s in range(draws)])
    constant = torch.full((dim,), dim**-0.5, dtype=torch.float64)
    axis = torch.eye(dim, dtype=torch.float64)[0]
    for direction in (constant, axis):
        squared = (first @ direction).square()
        assert squared.mean().item() * dim == pytest.approx(1, abs=5 * (2 / draws) ** 0.5)
        assert (first @ direction).mean().abs() < 5 / (dim * draws) ** 0.5


def test_same_seed_same_bits_in_another_process_and_global_state_untouched() -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    w = frames.simplex(37, 64, seed=11)
    assert torch.equal(torch.get_rng_state(), before)
    code = "import torch; from timm_etf import frames; print(frames.simplex(37, 64, seed=11).sum(0).tolist())"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == str(w.sum(0).tolist())
    assert not torch.equal(w, frames.simplex(37, 64, seed=12))


def test_values_are_pinned() -> None:
    # A change here would give every user of a seed another classifier than the one they trained under.
    w = frames.simplex(4, 5, seed=0)
    assert w[0].tolist() == pytest.approx(PINNED, abs=1e-12)


PINNED = [0.6365675727226591, -0.18114649638916444, 0.4459347564004789, -0.45008561848237666, -0.4006654480652091]


def test_drawn_on_the_cpu_under_a_meta_device() -> None:
    with torch.device("meta"):
        w = frames.simplex(10, 20)
    assert torch.equal(w, frames.simplex(10, 20))


@pytest.mark.parametrize(
    ("num_classes", "dim", "says"),
    [(12, 10, "width 11 or more"), (1, 10, "at least 2 classes"), (1000, 512, "at most 513 classes")],
)
def test_impossible_frames_name_the_fix(num_classes: int, dim: int, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        frames.make("auto", num_classes, dim)


def test_unknown_frame() -> None:
    with pytest.raises(UsageError, match="'auto' or one of 'simplex'"):
        frames.make("simplx", 10, 20)


@pytest.mark.parametrize(
    "w",
    [
        torch.eye(10),
        torch.randn(10, 64),
        torch.zeros(10, 64),
        frames.simplex(11, 64)[:10],
        torch.full((10, 64), torch.nan),
    ],
)
def test_is_simplex_refuses_everything_else(w: torch.Tensor) -> None:
    assert not frames.is_simplex(w)


def test_coherence_against_a_loop() -> None:
    w = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
    cosines = [
        float(torch.nn.functional.cosine_similarity(w[i].double(), w[j].double(), dim=0))
        for i in range(12)
        for j in range(i)
    ]
    assert frames.coherence(w) == pytest.approx(max(cosines), abs=1e-12)
    with pytest.raises(UsageError, match="K >= 2"):
        frames.coherence(w[0])
