import hashlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import commands
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


def test_simplex_of_a_thousand_classes_is_exact() -> None:
    for dim in (999, 2048):
        w = frames.simplex(1000, dim)
        gram = (torch.eye(1000, dtype=torch.float64) - 1 / 1000) * 1000 / 999
        assert (w @ w.T - gram).abs().max() < 1e-12
        assert w.sum(0).abs().max() < 1e-12


@given(st.integers(2, 40), st.integers(0, 2**31), st.data())
@settings(deadline=None)
def test_orthoplex_is_signed_orthonormal_vectors(dim: int, seed: int, data: st.DataObject) -> None:
    num_classes = data.draw(st.integers(dim + 2, 2 * dim))
    w = frames.orthoplex(num_classes, dim, seed=seed).numpy()
    signed_axes = np.concatenate([np.eye(dim), -np.eye(dim)])[:num_classes]
    assert np.abs(w @ w.T - signed_axes @ signed_axes.T).max() < 1e-12


@given(st.integers(3, 30), st.integers(0, 2**31))
@settings(deadline=None, max_examples=25)
def test_auto_is_optimal_around_every_edge(dim: int, seed: int) -> None:
    for num_classes in {dim - 1, dim, dim + 1, dim + 2, 2 * dim - 1, 2 * dim} - {1}:
        w = frames.make("auto", num_classes, dim, seed=seed)
        assert w.shape == (num_classes, dim)
        assert w.is_contiguous()
        assert (w.norm(dim=1) - 1).abs().max() < 1e-12
        assert frames.coherence(w) == pytest.approx(frames.rankin_bound(num_classes, dim), abs=1e-12)
    assert frames.resolve("auto", 2 * dim + 1, dim) == "spherical_code"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", frames.FRAMES)
def test_lower_precision_is_the_rounded_frame(name: str, dtype: torch.dtype) -> None:
    num_classes, dim = {"orthoplex": (30, 20), "spherical_code": (30, 7)}.get(name, (30, 40))
    w = frames.FRAMES[name](num_classes, dim, seed=3, dtype=dtype)
    assert w.dtype == dtype
    assert w.is_contiguous()
    assert torch.equal(w, frames.make(name, num_classes, dim, seed=3).to(dtype))
    assert frames.matches(7 * w, name, frames.coherence(frames.make(name, num_classes, dim, seed=3)))


@pytest.mark.parametrize(
    ("name", "num_classes"),
    [("simplex", 5), ("orthoplex", 40), ("orthonormal", 5), ("cube", 5), ("spherical_code", 60)],
)
def test_rotation_is_haar(name: str, num_classes: int) -> None:
    # E[w w'] = I/d under the Haar measure, so no direction is special; the uniform [0, 1) draw of published code puts
    # the constant vector 99.9 % inside the span. Over 400 draws the mean squared cosine is 1/d within a few percent.
    dim, draws = 24, 400
    first = torch.stack([frames.make(name, num_classes, dim, seed=s)[0] for s in range(draws)])
    constant = torch.full((dim,), dim**-0.5, dtype=torch.float64)
    axis = torch.eye(dim, dtype=torch.float64)[0]
    for direction in (constant, axis):
        squared = (first @ direction).square()
        assert squared.mean().item() * dim == pytest.approx(1, abs=5 * (2 / draws) ** 0.5)
        assert (first @ direction).mean().abs() < 5 / (dim * draws) ** 0.5


SHAPES = {"orthoplex": (40, 30), "spherical_code": (37, 9)}
DIGESTS = """
import hashlib
from timm_etf import frames
for name in frames.FRAMES:
    shape = SHAPES.get(name, (37, 64))
    print(name, hashlib.sha256(frames.make(name, *shape, seed=11).numpy()).hexdigest())
"""


def test_same_seed_same_bits_in_other_processes_and_global_state_untouched() -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    ours = {name: frames.make(name, *SHAPES.get(name, (37, 64)), seed=11) for name in frames.FRAMES}
    assert torch.equal(torch.get_rng_state(), before)
    for name, w in ours.items():
        same = torch.equal(w, frames.make(name, *SHAPES.get(name, (37, 64)), seed=12))
        assert same == (name == "hadamard")  # the one that has nothing random
    expected = "".join(f"{name} {hashlib.sha256(w.numpy()).hexdigest()}\n" for name, w in ours.items())
    for _ in range(2):
        assert commands.run(code=f"SHAPES = {SHAPES}\n{DIGESTS}", check=True).stdout == expected


def test_values_are_pinned() -> None:
    # A change here would give every user of a seed another classifier than the one they trained under.
    w = frames.simplex(4, 5, seed=0)
    assert w[0].tolist() == pytest.approx(PINNED, abs=1e-12)


PINNED = [0.6365675727226591, -0.18114649638916444, 0.4459347564004789, -0.45008561848237666, -0.4006654480652091]


@pytest.mark.parametrize("name", frames.FRAMES)
def test_drawn_on_the_cpu_under_a_meta_device(name: str) -> None:
    num_classes, dim = {"orthoplex": (30, 20), "spherical_code": (29, 7)}.get(name, (10, 20))  # in no cache yet
    with torch.device("meta"):
        w = frames.make(name, num_classes, dim)
    assert torch.equal(w, frames.make(name, num_classes, dim))


@pytest.mark.parametrize(
    ("name", "num_classes", "dim", "says"),
    [
        ("simplex", 12, 10, "width 11 or more"),
        ("simplex", 1000, 512, "at most 513 classes, or frame='auto'"),
        ("auto", 1, 10, "at least 2 classes"),
        ("auto", 10, 0, "at least 1 dimension"),
        ("auto", 10.5, 20, "whole numbers of classes"),
        ("orthoplex", 21, 10, "12 to 20 classes, not 21: use 'spherical_code'"),
        ("orthoplex", 11, 10, "use 'simplex'"),
        ("spherical_code", 20, 10, "more than 20 classes"),
        ("spherical_code", 3, 1, "2 different directions"),
        ("orthonormal", 11, 10, "at most 10 orthonormal"),
        ("uniform_qr", 11, 10, "at most 10 classes"),
        ("hadamard", 1025, 768, "1024 different rows"),
        ("cube", 1000, 9, "needs 10 dimensions"),
        ("simplx", 10, 20, "'auto' or one of 'simplex'"),
    ],
)
def test_impossible_frames_name_the_fix(name: str, num_classes: int, dim: int, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        frames.make(name, num_classes, dim)


@pytest.mark.parametrize(
    "w",
    [
        torch.eye(10),
        torch.randn(10, 64),
        torch.zeros(10, 64),
        frames.simplex(11, 64)[:10],
        torch.ones(4),
        torch.full((10, 64), torch.nan),
    ],
)
def test_is_simplex_refuses_everything_else(w: torch.Tensor) -> None:
    assert not frames.is_simplex(w)


@given(shapes(), st.floats(0.01, 100), st.floats(0, 2), st.integers(0, 2**31))
@settings(deadline=None)
def test_nearest_simplex_is_nearest(shape: tuple[int, int], scale: float, noise: float, seed: int) -> None:
    num_classes, dim = shape
    generator = torch.Generator().manual_seed(seed)
    means = scale * (
        frames.simplex(num_classes, dim, seed=seed)
        + noise * torch.randn(num_classes, dim, generator=generator, dtype=torch.float64)
        + torch.randn(dim, generator=generator, dtype=torch.float64)  # a global mean
    )
    nearest = frames.nearest_simplex(means)
    gram = num_classes / (num_classes - 1) * (np.eye(num_classes) - 1 / num_classes)
    assert np.abs((nearest @ nearest.T).numpy() - gram).max() < 1e-10
    if noise == 0:
        torch.testing.assert_close(nearest, frames.simplex(num_classes, dim, seed=seed), atol=1e-8, rtol=0)
    # No other rotation has a larger inner product with the means: the optimality condition, and random tries.
    ours = (nearest * means).sum()
    nuclear = np.linalg.svd((means - means.mean(0)).numpy(), compute_uv=False).sum()
    assert ours.item() == pytest.approx(math.sqrt(num_classes / (num_classes - 1)) * nuclear, rel=1e-9)
    for other in range(3):
        assert (frames.simplex(num_classes, dim, seed=seed + 1 + other) * means).sum() <= ours + 1e-9 * ours.abs()


def test_nearest_simplex_refuses_what_it_cannot_use() -> None:
    with pytest.raises(UsageError, match="not finite"):
        frames.nearest_simplex(torch.full((3, 4), torch.nan))
    with pytest.raises(UsageError, match="width 5 or more"):
        frames.nearest_simplex(torch.zeros(6, 4))
    with pytest.raises(UsageError, match=r"\[K, d\]"):
        frames.nearest_simplex(torch.zeros(6))
    # Means that span less than K-1 dimensions, even none, still give a simplex.
    assert frames.is_simplex(frames.nearest_simplex(torch.zeros(4, 6)))
    assert frames.is_simplex(frames.nearest_simplex(torch.eye(6)[:2].repeat(2, 1)))
