import logging
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from tests import commands
from timm_etf import frames
from timm_etf.frames import codes


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An assets folder of this test's own. huggingface_hub reads the variable when it is imported."""
    monkeypatch.setattr("huggingface_hub.constants.HF_ASSETS_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", str(tmp_path))
    return tmp_path / "timm_etf" / "frames" / "spherical_codes"


def test_a_thousand_classes_in_192_dimensions() -> None:
    w = frames.spherical_code(1000, 192)
    assert (w.norm(dim=1) - 1).abs().max() < 1e-12
    # The bar: a plain log-sum-exp descent reaches 0.049, random vectors have 0.34, no code is below 0.0157.
    assert 0.0157 < frames.coherence(w) < 0.047


@given(st.integers(3, 12), st.integers(1, 40))
@settings(deadline=None, max_examples=3)
def test_codes_are_between_their_bound_and_random_vectors(dim: int, more: int) -> None:
    num_classes = 2 * dim + more
    w = frames.spherical_code(num_classes, dim)
    assert w.shape == (num_classes, dim)
    assert (w.norm(dim=1) - 1).abs().max() < 1e-12
    reached, least = frames.coherence(w), frames.bound(num_classes, dim)
    random = min(frames.coherence(frames.gaussian(num_classes, dim, seed=s)) for s in range(3))
    assert least - 1e-9 <= reached < (least + random) / 2


@pytest.mark.parametrize(
    ("num_classes", "dim", "cosine"), [(12, 3, 5**-0.5), (24, 4, 0.5), (7, 3, 0.2101), (17, 2, np.cos(2 * np.pi / 17))]
)
def test_known_best_codes_are_found(num_classes: int, dim: int, cosine: float) -> None:
    assert frames.coherence(frames.spherical_code(num_classes, dim)) == pytest.approx(cosine, abs=2e-3)


def test_seeds_rotate_one_code() -> None:
    first, second = (frames.spherical_code(60, 10, seed=s) for s in (0, 1))
    assert not torch.allclose(first, second)
    torch.testing.assert_close(first @ first.T, second @ second.T, atol=1e-12, rtol=0)


@given(st.integers(2, 30), st.integers(1, 4), st.integers(1, 6), st.integers(0, 2**31))
@settings(deadline=None)
def test_orbits_and_gradient_against_the_whole_matrix(generators: int, blocks: int, order: int, seed: int) -> None:
    if blocks * order < 2:
        return
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(generators, blocks, order, generator=draw, dtype=torch.float64)
    x = x / x.flatten(1).norm(dim=1)[:, None, None]
    shifted = [np.roll(x[i].numpy(), t, axis=1).ravel() for i in range(generators) for t in range(order)]
    assert np.abs(codes._orbits(x).numpy() - np.array(shifted)).max() == 0

    beta = 7.0
    free = x.clone().requires_grad_()
    vectors = torch.stack([free[i].roll(t, 1).flatten() for i in range(generators) for t in range(order)])
    cosines = (vectors / vectors.norm(dim=1, keepdim=True)) @ (vectors / vectors.norm(dim=1, keepdim=True)).T
    cosines = cosines - 1e4 * torch.eye(len(cosines), dtype=torch.float64)
    (expected,) = torch.autograd.grad(torch.logsumexp(beta * cosines.flatten(), 0) / beta, free)
    whole = codes._BLOCK
    for block in (whole, 1):  # all at once, and one generator at a time
        codes._BLOCK = block
        try:
            largest, gradient = codes._soft_maximum_gradient(x, beta)
        finally:
            codes._BLOCK = whole
        # `gradient` treats the pairs of an orbit once, the whole matrix has each `order` times: the same direction.
        torch.testing.assert_close(gradient, expected.flatten(1), atol=1e-9, rtol=1e-6)
        assert largest == pytest.approx(cosines.max().item(), abs=1e-12)


def test_orbit_orders_leave_enough_generators_and_dimensions() -> None:
    for num_classes, dim in ((1000, 192), (1000, 384), (21843, 768), (21843, 888), (21843, 97), (50, 10), (5000, 2048)):
        order = codes._orbit_order(num_classes, dim)
        used = dim // order * order
        assert dim - used <= dim // 64
        assert num_classes // order >= 32
        assert order <= max(1, dim // 2)


def test_codes_are_cached_and_a_damaged_cache_is_made_again(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert codes.cached_coherence(30, 7) is None
    w = frames.spherical_code(30, 7)
    [file] = cache.glob("*.safetensors")
    assert codes.cached_coherence(30, 7) == pytest.approx(frames.coherence(w), abs=1e-6)
    written = file.stat().st_mtime_ns
    assert torch.equal(frames.spherical_code(30, 7), w)
    assert file.stat().st_mtime_ns == written
    for damage in (b"", file.read_bytes()[:-7], b"x" * 5000):
        file.write_bytes(damage)
        assert codes.cached_coherence(30, 7) is None or len(damage) > 5000
        caplog.clear()
        assert torch.equal(frames.spherical_code(30, 7), w)
        assert "computed again" in caplog.text
    save_file({"generators": torch.zeros(30, 7, 1)}, file)  # readable, but no unit vectors
    assert torch.equal(frames.spherical_code(30, 7), w)


def test_without_a_place_for_the_cache_the_code_is_still_made(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    w = frames.spherical_code(30, 7)
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING):
        assert torch.equal(frames.spherical_code(30, 7), w)
    assert "not cached" in caplog.text


KILLED = """
import resource, signal
from timm_etf import frames
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it; now the kernel kills who writes more than the limit
resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))
frames.spherical_code(30, 7)
print("survived")
"""


def test_a_kill_while_writing_leaves_nothing_that_is_taken_for_the_code(cache: Path, tmp_path: Path) -> None:
    killed = commands.run(code=KILLED, env={"HF_ASSETS_CACHE": str(tmp_path)})
    assert killed.returncode == -signal.SIGXFSZ, killed.stderr
    assert "survived" not in killed.stdout
    [torn] = (p for p in cache.iterdir() if p.suffix != ".lock")  # it was killed half way through the file
    assert torn.name.startswith(".")
    assert torn.stat().st_size <= 500
    assert codes.cached_coherence(30, 7) is None
    w = frames.spherical_code(30, 7)
    assert len([*cache.glob("spherical_code*.safetensors")]) == 1
    assert codes.cached_coherence(30, 7) == pytest.approx(frames.coherence(w), abs=1e-6)


def test_processes_that_want_one_code_share_it(tmp_path: Path) -> None:
    code = (
        "import logging; from timm_etf.frames import codes, spherical_code\n"
        "real = codes._optimise\n"
        "codes._optimise = lambda *a, **k: print('computed', flush=True) or real(*a, **k)\n"
        "print(spherical_code(200, 30).sum().item())"
    )
    both = [commands.Command(code=code, env={"HF_ASSETS_CACHE": str(tmp_path)}) for _ in "ab"]
    assert [process.wait() for process in both] == [0, 0]
    printed = "".join(process.stdout for process in both)
    assert printed.count("computed") == 1
    assert len({line for line in printed.splitlines() if line != "computed"}) == 1
