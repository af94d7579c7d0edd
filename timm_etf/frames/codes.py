"""Spherical codes: more than 2d unit vectors in R^d, spread by optimisation. Nothing optimal is known for most K and d.

A general code costs a K x K matrix of cosines at every step. Here the code is the orbit of m = K/g generators under a
group of order g (cyclic shifts within each of the d/g blocks of g coordinates): it has as many free numbers for each
different cosine as a general code, reaches the same coherence (tests/benchmarks/spherical_codes.py), and its cosines
are m^2 circular correlations, g^2 times cheaper by the fast Fourier transform.

Shape suffixes: M generators (B of them in a block), C = d/g blocks of G coordinates, F = G//2 + 1 frequencies.
"""

import logging
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor

from timm_etf.atomic import atomic_file
from timm_etf.errors import UsageError
from timm_etf.frames.exact import check, haar

_logger = logging.getLogger(__name__)

_VERSION = 1
"""Of the algorithm: a change that gives other codes counts it up, so that cached ones are not mixed with them."""

_GENERATORS = 64
"""The orbits are as long as leaves this many generators, which is where longer ones begin to cost coherence."""

_BLOCK = 1 << 22
"""Cosines held at once."""


def spherical_code(num_classes: int, dim: int, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """K > 2d unit vectors with a small largest cosine, found by descent on its soft maximum, then randomly rotated.

    The code of a (K, d) is computed once, on a GPU where there is one, and cached on disk, in huggingface_hub's assets
    folder (`HF_ASSETS_CACHE` moves it); the seed only rotates it. Between machines of different kinds the codes may
    differ in more than rounding; a trained model carries its own.

    Args:
        num_classes: K, more than 2d.
        dim: d, at least 2.
        seed: Seed of the rotation.
        dtype: Type of the result.

    Returns:
        Frame of shape [K, d]: unit rows. (1000, 192) reaches a largest cosine of 0.046, where random directions have
        0.34 and `levenshtein_bound` is 0.016.

    Raises:
        UsageError: If K <= 2d, where a better frame is known in closed form, or d < 2.

    Source:
        The objective is that of softmax codes at a falling temperature: Jiang et al. 2023, Generalized neural collapse
        for a large number of classes (arXiv 2310.05351). The orbit construction is our own.

    Example:
        >>> from timm_etf.frames.bounds import coherence
        >>> round(coherence(spherical_code(12, 3)), 4)  # the icosahedron
        0.4472
    """
    check(num_classes, dim)
    if num_classes <= 2 * dim:
        raise UsageError(
            f"A spherical code is for more than {2 * dim} classes in {dim} dimensions, not {num_classes}: use 'auto'."
        )
    if dim == 1:
        raise UsageError(f"One dimension holds 2 different directions, not {num_classes}.")
    if dim == 2:
        angles_K = torch.arange(num_classes, dtype=torch.float64, device="cpu") * (2 * math.pi / num_classes)
        code_KD = torch.stack([angles_K.cos(), angles_K.sin()], dim=1)
    else:
        code_KD = _orbits(_generators(num_classes, dim))[:num_classes].double()
        code_KD = torch.nn.functional.pad(code_KD, (0, dim - code_KD.shape[1]))
    rotated_KD = code_KD @ haar(dim, dim, seed).T
    return torch.nn.functional.normalize(rotated_KD, dim=1).to(dtype)


def _orbits(x_MCG: Tensor) -> Tensor:
    """All cyclic shifts of the generators, [M*G, C*G]: the G of one generator together."""
    shifts_G = torch.arange(x_MCG.shape[2], device=x_MCG.device)
    index_GG = (shifts_G - shifts_G.unsqueeze(1)) % len(shifts_G)
    return x_MCG[:, :, index_GG].permute(0, 2, 1, 3).flatten(2).flatten(0, 1)


def _orbit_order(num_classes: int, dim: int) -> int:
    """G, the length of the orbits.

    The divisor of the dimension that leaves the number of generators nearest to what is wanted, but at least 4 blocks:
    with fewer, the largest cosine grows. A dimension without such a divisor gives up a few coordinates.
    """
    wanted = max(1, min(num_classes // _GENERATORS, dim // 4))
    divisors = [g for g in range(1, dim + 1) if dim // g * g >= dim - dim // 64]
    return min(divisors, key=lambda g: (abs(math.log(g / wanted)), -g))


def cached_coherence(num_classes: int, dim: int) -> float | None:
    """Coherence of the code for K and d if this machine has computed it already, else None."""
    from safetensors import safe_open

    try:
        with safe_open(_path(num_classes, dim), "pt") as file:
            return float(file.metadata()["coherence"])
    except Exception:  # not there, or damaged: `_generators` says so when it is needed
        return None


def cached_file(num_classes: int, dim: int) -> bytes | None:
    """The cached code for K and d, for `cache_file` on another machine; None if it is not there."""
    try:
        return _path(num_classes, dim).read_bytes()
    except (OSError, ValueError):
        return None


def cache_file(num_classes: int, dim: int, content: bytes) -> None:
    """Take another machine's code for K and d, unless there is one; where nothing can be cached it is computed."""
    try:
        path = _path(num_classes, dim)
        if not path.exists():
            with atomic_file(path) as new:
                new.write_bytes(content)
    except (OSError, ValueError) as e:
        _logger.warning(f"The spherical code {num_classes} x {dim} was not cached ({e}).")


def _path(num_classes: int, dim: int) -> Path:
    from huggingface_hub import cached_assets_path

    folder = cached_assets_path("timm_etf", "frames", "spherical_codes")  # made here, if it was not there
    return folder / f"spherical_code{_VERSION}_{num_classes}x{dim}.safetensors"


def _generators(num_classes: int, dim: int) -> Tensor:
    """Generators [M, C, G] of the code, from the cache or computed and then cached.

    Of the processes that want the same code one computes it, and the others wait and read it.
    """
    from filelock import FileLock

    order = _orbit_order(num_classes, dim)
    shape = (-(-num_classes // order), dim // order, order)
    name = f"spherical code {num_classes} x {dim}"
    with ExitStack() as stack:
        try:
            path = _path(num_classes, dim)
            stack.enter_context(FileLock(f"{path}.lock"))
        except (OSError, ValueError) as e:  # ValueError: where the folder should be there is a file
            _logger.warning(f"The {name} was not cached ({e}): it is computed again each time.")
            return _optimise(*shape, name=name)
        x_MCG = _load(path, shape)
        if x_MCG is None:
            x_MCG = _optimise(*shape, name=name)
            try:
                _store(x_MCG, path)
            except Exception as e:  # a full disk (safetensors has an exception of its own): the code itself is there
                _logger.warning(f"The {name} was not cached ({e}): it is computed again next time.")
    return x_MCG


def _load(path: Path, shape: tuple[int, int, int]) -> Tensor | None:
    from safetensors.torch import load_file

    if not path.exists():
        return None
    try:
        x_MCG = load_file(path)["generators"]
        if x_MCG.shape != shape or not (x_MCG.double().square().sum(dim=(1, 2)) - 1).abs().max() < 1e-4:
            raise ValueError("it does not hold unit vectors")
    except Exception as e:  # damaged: safetensors has an exception of its own
        _logger.warning(f"{path} is not usable ({e}): the code is computed again.")
        return None
    return x_MCG


def _store(x_MCG: Tensor, path: Path) -> None:
    from safetensors.torch import save_file

    coherence, _ = _soft_maximum_gradient(x_MCG.double(), 1.0)
    with atomic_file(path) as new:
        save_file({"generators": x_MCG}, new, metadata={"coherence": repr(coherence)})


@torch.no_grad()
def _optimise(generators: int, blocks: int, order: int, *, name: str) -> Tensor:
    """Descend on log-sum-exp(beta * cosine) / beta with a growing beta and a shrinking step."""
    from tqdm import tqdm

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    draw = torch.Generator("cpu").manual_seed(0)
    x_MD = torch.randn(generators, blocks * order, generator=draw, dtype=torch.float32, device="cpu").to(device)
    x_MD = torch.nn.functional.normalize(x_MD, dim=1)
    sqrt_dim = math.sqrt(blocks * order)  # a random cosine is of the order of its inverse, and so is a coordinate
    cosines = generators**2 * order
    steps = int(min(1500, max(300, 4e9 / cosines)))
    optimizer = torch.optim.Adam([x_MD], betas=(0.9, 0.99))
    bar = tqdm(total=steps, desc=name, unit="step", delay=2, mininterval=0.5, leave=False)
    alone = device.type == "cpu" and cosines <= _BLOCK
    with bar, _one_thread(alone), torch.device(device):  # whatever the default device is, meta for one
        for step in range(steps):
            done = step / steps
            beta = sqrt_dim * 250**done
            optimizer.param_groups[0]["lr"] = 0.1 / sqrt_dim * (math.cos(math.pi * done) + 1) / 2 + 1e-5
            largest, x_MD.grad = _soft_maximum_gradient(x_MD.view(generators, blocks, order), beta)
            optimizer.step()
            x_MD.copy_(torch.nn.functional.normalize(x_MD, dim=1))
            bar.update()
            if step % 50 == 0:
                bar.set_postfix_str(f"largest cosine {largest:.4f}", refresh=False)
    return x_MD.view(generators, blocks, order).cpu()


@contextmanager
def _one_thread(wanted: bool) -> Iterator[None]:
    """Compute small steps on one thread: beside other work, several wait for each other most of the time.

    On 2 busy cores 1000 x 192 took 62 s with two threads and 9 s with one, on idle ones about 1 s and 3 s.
    """
    before = torch.get_num_threads()
    if wanted:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _soft_maximum_gradient(x_MCG: Tensor, beta: float) -> tuple[float, Tensor]:
    """Largest cosine and gradient [M, C*G] of the soft maximum, in blocks of generators.

    The weights exp(beta (cosine - reference)) of a block are scaled to the largest cosine seen so far, and what was
    summed up before is rescaled when it grows, so that nothing overflows and one pass over the blocks is enough.
    """
    generators, _, order = x_MCG.shape
    x_FMC = torch.fft.rfft(x_MCG, dim=2).permute(2, 0, 1)
    gradient_MCG = torch.zeros_like(x_MCG)
    total, reference = 0.0, -1.0
    rows = max(1, _BLOCK // (generators * order))
    for start in range(0, generators, rows):
        # Correlation theorem: cosine of generator i with generator j shifted by t.
        cosines_BMG = torch.fft.irfft((x_FMC[:, start : start + rows] @ x_FMC.mH).permute(1, 2, 0), n=order, dim=2)
        block = torch.arange(cosines_BMG.shape[0], device=x_MCG.device)
        cosines_BMG[block, start + block, 0] = -1e4  # a vector with itself
        largest = cosines_BMG.max().item()
        if largest > reference:
            shrink = math.exp(beta * (reference - largest))
            gradient_MCG *= shrink
            total, reference = total * shrink, largest
        weights_BMG = cosines_BMG.sub_(reference).mul_(beta).exp_()
        total += weights_BMG.sum().item()
        # The gradient is a sum of shifted generators: a circular convolution, again by frequency.
        weights_FBM = torch.fft.rfft(weights_BMG, dim=2).permute(2, 0, 1)
        gradient_MCG[start : start + rows] = torch.fft.irfft((weights_FBM @ x_FMC).permute(1, 2, 0), n=order, dim=2)
    gradient_MD = gradient_MCG.flatten(1) * (2 / total)
    x_MD = x_MCG.flatten(1)
    return reference, gradient_MD - (gradient_MD * x_MD).sum(dim=1, keepdim=True) * x_MD
