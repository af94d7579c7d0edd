"""Frames: K unit vectors in R^d that a fixed classifier can use as its class directions. Tensors in, tensors out.

| K classes in d dimensions | frame | largest cosine |
|---|---|---|
| K <= d+1 | `simplex` | -1/(K-1), optimal |
| d+2 <= K <= 2d | `orthoplex` | 0, optimal |
| K > 2d | `spherical_code` | optimised; see `levenshtein_bound` |

`gaussian`, `orthonormal`, `hadamard`, `cube` and `uniform_qr` are controls: what else has been tried as a fixed
classifier. Every frame is drawn in float64 from a generator of its own, so that the same arguments give the same
vectors in every process (to rounding, if the number of threads differs), and torch's global random state is never
touched. `nearest` is the frame closest to a classifier that is there, `from_means` that of a
backbone's class means. In those of `hierarchy` and
`from_similarity` cosines follow who is near whom; `ClassTree` reads that from folders and files.

Shape suffixes: `w_KD` is a frame with K vectors of d dimensions, `u_DM` has M orthonormal columns.
"""

from collections.abc import Callable

from torch import Tensor

from timm_etf.errors import UsageError
from timm_etf.frames.bounds import bound, coherence, levenshtein_bound, rankin_bound, welch_bound
from timm_etf.frames.codes import spherical_code
from timm_etf.frames.controls import cube, gaussian, hadamard, orthonormal, uniform_qr
from timm_etf.frames.enlarging import enlarged
from timm_etf.frames.exact import is_simplex, nearest_simplex, orthoplex, simplex
from timm_etf.frames.hierarchy import from_similarity, hierarchy
from timm_etf.frames.nearest import from_means, nearest
from timm_etf.frames.trees import ClassTree

__all__ = [
    "FITTED",
    "FRAMES",
    "ClassTree",
    "bound",
    "coherence",
    "cube",
    "enlarged",
    "from_means",
    "from_similarity",
    "gaussian",
    "hadamard",
    "hierarchy",
    "is_simplex",
    "levenshtein_bound",
    "make",
    "matches",
    "nearest",
    "nearest_simplex",
    "orthonormal",
    "orthoplex",
    "rankin_bound",
    "resolve",
    "simplex",
    "spherical_code",
    "uniform_qr",
    "welch_bound",
]

FRAMES: dict[str, Callable[..., Tensor]] = {
    f.__name__: f for f in (simplex, orthoplex, spherical_code, gaussian, orthonormal, hadamard, cube, uniform_qr)
}
"""Frames by name: functions `(num_classes, dim, *, seed, dtype) -> [K, d]`."""


FITTED = ("nearest", "hierarchy", "own")
"""Frames that follow a classifier, a `ClassTree`, or are a caller's own: no name alone makes them."""


def resolve(name: str, num_classes: int, dim: int) -> str:
    """Name of the frame that `make` builds: `"auto"` becomes the best one for K classes in d dimensions.

    Args:
        name: `"auto"` or a name in `FRAMES`.
        num_classes: K.
        dim: d.

    Returns:
        A name in `FRAMES`.

    Raises:
        UsageError: If the name is unknown.

    Example:
        >>> [resolve("auto", 1000, dim) for dim in (2048, 512, 192)]
        ['simplex', 'orthoplex', 'spherical_code']
    """
    if name == "auto":
        if num_classes <= dim + 1:
            return "simplex"
        return "orthoplex" if num_classes <= 2 * dim else "spherical_code"
    if name not in FRAMES:
        means = " From class means: timm_etf.frames.from_means, or --frame-from-means." if "means" in name else ""
        raise UsageError(f"Unknown frame {name!r}: use 'auto' or one of {', '.join(map(repr, FRAMES))}.{means}")
    return name


def make(name: str, num_classes: int, dim: int, *, seed: int = 0) -> Tensor:
    """Frame by name.

    Args:
        name: `"auto"` or a name in `FRAMES`.
        num_classes: K, the number of unit vectors.
        dim: d, their dimension.
        seed: Seed of the frame's random part.

    Returns:
        Frame of shape [K, d], float64, unit rows, contiguous, on the CPU.

    Raises:
        UsageError: If the name is unknown or the frame does not exist for this K and d.

    Example:
        >>> import torch
        >>> torch.equal(make("auto", 10, 64, seed=1), simplex(10, 64, seed=1))
        True
    """
    return FRAMES[resolve(name, num_classes, dim)](num_classes, dim, seed=seed)


def matches(w: Tensor, name: str, cosine: float, tolerance: float = 5e-3) -> bool:
    """Whether stored weights can be frame `name` under any rotation and one common scale; learned weights are not.

    Args:
        w: Vectors of shape [K, d], any float dtype.
        name: Name of the frame they should be.
        cosine: That frame's coherence.
        tolerance: Largest deviation of a row norm (relative) and of a cosine; the default admits bfloat16 copies.

    Returns:
        True if all norms are equal and no cosine (among the first 1,000 rows, which bounds the cost at any K) exceeds
        `cosine`; for the simplex frames, if the rows are a simplex ETF.

    Example:
        >>> w = orthoplex(12, 8)
        >>> matches(3 * w.bfloat16(), "orthoplex", 0.0), matches(w + 0.3, "orthoplex", 0.0)
        (True, False)
    """
    if w.dim() != 2 or w.shape[0] < 2:
        return False
    if name in ("simplex", "uniform_qr"):
        return is_simplex(w, tolerance)
    norms_K = w.detach().float().norm(dim=1)
    even = bool(((norms_K / norms_K.mean() - 1).abs() < tolerance).all())  # also False for nan and for zero rows
    return even and coherence(w[:1000]) < cosine + tolerance
