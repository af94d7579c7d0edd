"""The fixed frame nearest to vectors that are there: a trained classifier's rows, or class means."""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from timm_etf.errors import UsageError
from timm_etf.frames.bounds import coherence
from timm_etf.frames.codes import spherical_code
from timm_etf.frames.exact import check, generator, nearest_simplex

SLACK = 0.05
"""How much larger the largest cosine may be than that of the best frame, where no simplex fits."""

_MOST_STEPS = 500


def nearest(rows: Tensor) -> Tensor:
    r"""The fixed frame that changes a classifier least.

    Where a simplex fits (K <= d+1) it is the nearest one, `nearest_simplex`. Beyond that no optimal frame is near to
    anything: the centred unit rows themselves are pushed apart wherever two are closer than the best frame's coherence
    and 0.05 more,

    .. math:: w_i \leftarrow w_i - \eta \sum_{j \ne i} \max(0, w_i^\top w_j - \mu)\, w_j, \qquad |w_i| = 1,

    which leaves rows alone that have no such neighbour; of equal rows each is moved by a thousandth first.

    Args:
        rows: Weight of a classifier, [K, d] with K >= 2, finite; neither a common offset nor a common scale matters.

    Returns:
        Unit rows, [K, d], float64, on the device of the rows.

    Raises:
        UsageError: If the rows are not a finite matrix, or all alike, as of a classifier that was never trained.

    Example:
        >>> from timm_etf.frames import simplex
        >>> w = simplex(5, 16, seed=3)
        >>> torch.allclose(nearest(2.5 * w + 7.0), w)
        True
    """
    unit_KD = _directions(rows, "classifier's rows")
    num_classes, dim = rows.shape
    if num_classes <= dim + 1:
        return nearest_simplex(centred(rows))
    best = 0.0 if num_classes <= 2 * dim else coherence(spherical_code(num_classes, dim))
    return _pushed_apart(unit_KD, best + SLACK)


def from_means(class_means: Tensor) -> Tensor:
    r"""The frame that a backbone's class means make: who is near whom is what it has found.

    Where a simplex fits (K <= d+1) it is the one nearest to the means, which keeps their rotation alone. Beyond that it
    is their own directions about the global mean,

    .. math:: w_k = (m_k - \bar m) / \| m_k - \bar m \|,

    and classes that are alike stay close: a random code of so many classes puts any two of them side by side.

    Args:
        class_means: Mean features by class, [K, d] with K >= 2, such as `timm_etf.geometry.ClassMoments.of(x, y).mean`.

    Returns:
        Unit rows, [K, d], float64, on the device of the means.

    Raises:
        UsageError: If the means are not a finite matrix, or one is the global mean.

    Example:
        >>> means = torch.tensor([[3.0, 1.0], [3.0, -1.0], [-3.0, 1.0], [-3.0, -1.0]]) + 7.0  # two pairs
        >>> w = from_means(means)
        >>> [round(cosine, 2) for cosine in (w @ w.T)[0].tolist()]
        [1.0, 0.8, -0.8, -1.0]
    """
    unit_KD = _directions(class_means, "class means")
    num_classes, dim = class_means.shape
    return nearest_simplex(centred(class_means)) if num_classes <= dim + 1 else unit_KD


def _directions(rows: Tensor, what: str) -> Tensor:
    """Unit directions of the rows about their mean, checked to be there."""
    if rows.dim() != 2:
        raise UsageError(f"The {what} have the shape [K, d], got {list(rows.shape)}.")
    check(*rows.shape)
    if not rows.isfinite().all():
        raise UsageError(f"The {what} are not finite: the training diverged, or they were damaged.")
    centred_KD = centred(rows)
    if not (centred_KD.norm(dim=1) > 0).all():
        raise UsageError(f"The {what} are all alike, or one is their mean: they hold no directions to be near to.")
    return torch.nn.functional.normalize(centred_KD, dim=1)


def centred(rows: Tensor) -> Tensor:
    """Rows less their mean, in float64: an offset that all classes share changes no probability."""
    rows_KD = rows.detach().double()
    return rows_KD - rows_KD.mean(dim=0)


def mean_cosine(rows: Tensor, frame: Tensor) -> float:
    """Mean cosine of a (centred) row with its vector of the frame; 1 where the rows are the frame already.

    It is no measure of collapse: rows that no training has moved are close to a simplex in a wide space, too.

    Example:
        >>> random = torch.randn(100, 400, generator=torch.Generator().manual_seed(0))
        >>> round(mean_cosine(random, nearest(random)), 1)
        1.0
    """
    return torch.nn.functional.cosine_similarity(centred(rows), frame.to(rows.device), dim=1).mean().item()


def least_squares_scale(rows: Tensor, frame: Tensor) -> float:
    """The scale s > 0 for which s times a frame of unit rows is closest to the (centred) rows."""
    return ((centred(rows) * frame.to(rows.device)).sum() / len(frame)).item()


def turned(
    frame: Tensor,
    scale: float,
    features: Tensor,
    logits: Tensor | Callable[[Tensor], Tensor],
    *,
    steps: int = 300,
    batch_size: int = 512,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> tuple[Tensor, float]:
    r"""Turn a frame in the space of features until it says what a classifier says of these features.

    The nearest frame is near to the classifier's rows, wherever features lie. This one is near to its answers where
    they do: it minimises the mean Kullback-Leibler divergence

    .. math:: \min_{Q \in O(d),\, s > 0}\ \mathbb{E}_h\, \mathrm{KL}\big(\mathrm{softmax}(z(h))\,\|\,
        \mathrm{softmax}(s W Q h)\big)

    by gradient descent with momentum on the Stiefel manifold (the orthonormal basis of the space that the frame spans),
    with a polar retraction. All cosines of the frame stay what they are, and features are left alone.

    Args:
        frame: Unit rows to start from, [K, d].
        scale: Logit scale to start from.
        features: What entered the classifier, [N, d], on the device to compute on.
        logits: What it said, z(h), [N, K], or a function that says it of features [B, d].
        steps: Steps of gradient descent.
        batch_size: Features of a step.
        progress: Wraps the steps, as `tqdm` does.

    Returns:
        Unit rows, [K, d], float64, and the scale. The frame and the scale that were given, if no others are better on
        the first 10,000 features.

    Example:
        >>> from timm_etf.frames import simplex
        >>> features = torch.randn(500, 16, generator=torch.Generator().manual_seed(0)) * torch.logspace(0.5, -1, 16)
        >>> classifier = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
        >>> logits = features @ classifier.T
        >>> frame, scale = turned(nearest(classifier), 3.0, features, logits)
        >>> both = [f.float() @ features.T for f in (nearest(classifier), frame)]
        >>> [round((said.argmax(0) == logits.argmax(1)).float().mean().item(), 2) for said in both]
        [0.84, 0.97]
    """
    rows_KD = frame.to(features.device, torch.float32)
    left, singular, right = torch.linalg.svd(rows_KD.double(), full_matrices=False)
    rank = int((singular > 1e-6 * singular[0]).sum())
    within_KR = (left[:, :rank] * singular[:rank]).float()  # the frame in the basis of its own space
    start_DR = right[:rank].T.float()
    basis_DR, log_scale = start_DR.clone(), math.log(scale)
    velocity_DR, size = torch.zeros_like(basis_DR), 0.0
    pull, pull_size = 0.0, 0.0
    generator = torch.Generator().manual_seed(0)
    eye_RR = torch.eye(rank, device=features.device)

    def loss_of(basis: Tensor, factor: Tensor | float, chosen: Tensor | slice) -> Tensor:
        h_BD = features[chosen]
        said_BK = logits[chosen] if isinstance(logits, Tensor) else logits(h_BD)
        ours_BK = (h_BD @ basis) @ within_KR.T * factor
        return kl_div(ours_BK.log_softmax(1), said_BK.log_softmax(1), log_target=True, reduction="batchmean")

    for step in progress(range(steps)):
        rate = 0.5 * (1 + math.cos(math.pi * step / steps))
        chosen = torch.randint(len(features), (min(batch_size, len(features)),), generator=generator)
        with torch.enable_grad():
            basis = basis_DR.requires_grad_()
            factor = torch.tensor(math.exp(log_scale), device=features.device, requires_grad=True)
            slope_DR, slope = torch.autograd.grad(loss_of(basis, factor, chosen.to(features.device)), (basis, factor))
        basis_DR = basis_DR.detach()
        inner_RR = basis_DR.T @ slope_DR
        along_DR = slope_DR - basis_DR @ ((inner_RR + inner_RR.T) / 2)
        # Divided by the size of the slopes, not by its own: where they only scatter, the mean of the last moves little.
        velocity_DR = 0.9 * velocity_DR + 0.1 * along_DR
        size = 0.95 * size + 0.05 * along_DR.square().sum().item()
        pull, pull_size = 0.9 * pull + 0.1 * slope.item(), 0.95 * pull_size + 0.05 * slope.item() ** 2
        if size == 0:
            break
        basis_DR = basis_DR - (_TURN * rate * (rank / size) ** 0.5) * velocity_DR
        for _ in range(2):  # Newton and Schulz's iteration to the nearest orthonormal one
            basis_DR = basis_DR @ (1.5 * eye_RR - 0.5 * basis_DR.T @ basis_DR)
        log_scale -= _STRETCH * rate * pull / pull_size**0.5 if pull_size else 0.0
    first = slice(0, 10_000)
    with torch.no_grad():
        if not loss_of(basis_DR, math.exp(log_scale), first) < loss_of(start_DR, scale, first):
            return frame.double(), scale
    u_DR, _, vh_RR = torch.linalg.svd(basis_DR.double(), full_matrices=False)  # orthonormal to the last digit
    within_KR = left[:, :rank] * singular[:rank]
    return torch.nn.functional.normalize(within_KR @ (u_DR @ vh_RR).T, dim=1), math.exp(log_scale)


_TURN = 0.014
"""How far the first steps turn each direction, in radians, where their slopes agree."""

_STRETCH = 0.02
"""How much the first steps change the logarithm of the scale."""


def looks_random(rows: Tensor) -> bool:
    """Whether the directions of the rows are spread as random ones are: as of a classifier that was never trained.

    Cosines of random directions in R^d have the standard deviation 1/sqrt(d). Training changes that: classes that are
    alike come closer together, or, towards neural collapse, all become equally far apart. Fewer than 15 classes do not
    tell.
    """
    unit_KD = torch.nn.functional.normalize(rows.detach().double()[:2000], dim=1)
    cosines_KK = unit_KD @ unit_KD.T
    above = cosines_KK[torch.ones_like(cosines_KK, dtype=torch.bool).triu(1)]
    if len(above) < 100:
        return False
    spread = above.square().mean().sqrt().item() * rows.shape[1] ** 0.5
    return abs(spread - 1) < 0.03 + 3 / (2 * len(above)) ** 0.5  # three standard errors


def _pushed_apart(unit_KD: Tensor, largest: float) -> Tensor:
    if coherence(unit_KD) > 1 - 1e-6:  # equal rows would be pushed alike, for ever
        noise_KD = torch.randn(unit_KD.shape, dtype=torch.float64, device="cpu", generator=generator(0))
        unit_KD = unit_KD + 1e-3 * torch.nn.functional.normalize(noise_KD, dim=1).to(unit_KD.device)
        unit_KD = torch.nn.functional.normalize(unit_KD, dim=1)
    step, before = 0.5, float("inf")
    for _ in range(_MOST_STEPS):
        push_KD = torch.empty_like(unit_KD)
        above = -1.0
        for start in range(0, len(unit_KD), 1024):
            excess_BK = unit_KD[start : start + 1024] @ unit_KD.T - (largest - 0.1 * SLACK)
            excess_BK.diagonal(offset=start).fill_(-1)
            above = max(above, excess_BK.max().item())
            push_KD[start : start + 1024] = excess_BK.clamp_(min=0) @ unit_KD
        if above <= 0.1 * SLACK:
            break
        step = step / 2 if above > before else min(0.5, 1.1 * step)
        before = above
        unit_KD = torch.nn.functional.normalize(unit_KD - step * push_KD, dim=1)
    return unit_KD
