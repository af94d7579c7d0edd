"""Further vectors beside a frame whose own vectors stay where they are."""

import math

import torch
from torch import Tensor

from timm_etf.errors import UsageError
from timm_etf.frames.bounds import coherence
from timm_etf.frames.exact import check, generator, haar, simplex

_STEPS = 400


def enlarged(frame: Tensor, count: int, *, seed: int = 0) -> Tensor:
    """A frame with further vectors, as far from the old ones and from each other as can be without moving an old one.

    An orthoplex goes on with its own vertices, which costs no coherence until all 2d are there. Where the old vectors
    leave enough directions free, the new ones are a simplex in these, orthogonal to every old one; nothing is further
    from a simplex. Elsewhere, as beside a spherical code, they are found by descent on the soft maximum of their
    cosines: vectors that had been planned together would be further apart.

    Args:
        frame: Vectors of shape [K, d], K >= 2; any scale.
        count: Number of new vectors, at least 1.
        seed: Of the new vectors.

    Returns:
        Unit rows [K + count, d], float64, on the CPU: the old ones first.

    Raises:
        UsageError: If the count is below 1, or the frame is no finite matrix of vectors.

    Example:
        >>> from timm_etf.frames import orthoplex, simplex
        >>> [round(abs(coherence(enlarged(w, 4))), 6) for w in (orthoplex(20, 16), simplex(10, 16))]
        [0.0, 0.0]
    """
    if frame.dim() != 2 or not frame.isfinite().all():
        raise UsageError(f"A frame is a finite matrix [K, d], got shape {list(frame.shape)}.")
    num_classes, dim = frame.shape
    check(num_classes, dim)
    if not hasattr(count, "__index__") or count < 1:
        raise UsageError(f"A frame is enlarged by at least 1 vector, got {count!r}.")
    old_KD = torch.nn.functional.normalize(frame.detach().double().cpu(), dim=1)
    if dim < num_classes <= 2 * dim - count:
        vertices = torch.cat([old_KD, -old_KD[num_classes - dim :][:count]])
        if coherence(vertices) <= max(0.0, coherence(old_KD)) + 1e-6:
            return vertices
    _, singular, vh_DD = torch.linalg.svd(old_KD)
    rank = int((singular > 1e-6 * singular[0]).sum())
    if free := dim - rank if dim - rank >= max(1, count - 1) else 0:
        new_ND = (haar(free, 1, seed).T if count == 1 else simplex(count, free, seed=seed)) @ vh_DD[rank:]
    else:
        new_ND = _far(old_KD, count, seed)
    return torch.cat([old_KD, new_ND])


def _far(old_KD: Tensor, count: int, seed: int) -> Tensor:
    """Vectors far from the old ones and each other, by descent at a falling temperature, as for spherical codes."""
    dim = old_KD.shape[1]
    new_ND = torch.randn(count, dim, generator=generator(seed), dtype=torch.float64, device="cpu")
    new_ND = torch.nn.functional.normalize(new_ND, dim=1).requires_grad_()
    itself = torch.zeros(count, len(old_KD) + count, dtype=torch.bool, device="cpu")
    itself[:, len(old_KD) :].fill_diagonal_(True)
    optimizer = torch.optim.Adam([new_ND], betas=(0.9, 0.99))
    with torch.enable_grad():
        for step in range(_STEPS):
            done = step / _STEPS
            beta = dim**0.5 * 250**done
            optimizer.param_groups[0]["lr"] = (0.1 * (math.cos(math.pi * done) + 1) / 2 + 1e-5) / dim**0.5
            unit_ND = torch.nn.functional.normalize(new_ND, dim=1)
            cosines = (unit_ND @ torch.cat([old_KD, unit_ND]).T).masked_fill(itself, -torch.inf)
            # Of each new vector: a maximum over all of them would move the worst alone.
            loss = ((beta * cosines).logsumexp(dim=1) / beta).sum()
            (new_ND.grad,) = torch.autograd.grad(loss, [new_ND])
            optimizer.step()
    return torch.nn.functional.normalize(new_ND.detach(), dim=1)
