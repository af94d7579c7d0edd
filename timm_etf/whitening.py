"""`SwitchWhiten2d`: switchable whitening, the explicit-whitening baseline beside a fixed classifier.

Shape suffixes: N images, G groups of C channels each, P positions (height x width).
"""

from contextlib import nullcontext
from typing import Literal

import torch
from torch import Tensor, nn

from timm_etf.errors import UsageError

__all__ = ["SwitchWhiten2d", "newton_inverse_sqrt", "whiten_resnet"]

CANDIDATES = ("bw", "iw", "bn", "in", "ln")
"""Batch and instance whitening, batch, instance and layer normalisation."""


def newton_inverse_sqrt(covariance: Tensor, steps: int = 5) -> Tensor:
    r"""Inverse square root of symmetric positive definite matrices by Newton's iteration: products alone.

    .. math:: P_0 = I, \quad P_{k+1} = \tfrac12 (3 P_k - P_k^3 S / \mathrm{tr} S), \quad
        S^{-1/2} \approx P_T / \sqrt{\mathrm{tr} S}

    Args:
        covariance: Matrices S of shape [*, C, C].
        steps: T. The error of an eigenvalue falls quadratically once it is near: small eigenvalues (relative to the
            trace) need more steps, and are whitened in part only until then.

    Returns:
        Matrices of shape [*, C, C].

    Source:
        Huang et al. 2019, Iterative normalization (arXiv 1904.03441), eq. 6; Pan et al. 2019 (arXiv 1904.09739).

    Example:
        >>> newton_inverse_sqrt(4 * torch.eye(2), steps=8).round(decimals=4).tolist()
        [[0.5, 0.0], [0.0, 0.5]]
    """
    trace = covariance.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    scaled = covariance / trace
    eye = torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
    # In the coupled form, with Q = P S, which in exact arithmetic is the same: the iteration as it is written above
    # lets rounding errors grow, and diverges on ill-conditioned matrices where this one converges.
    factor = 1.5 * eye - 0.5 * scaled
    p, q = factor, scaled @ factor
    for step in range(1, steps):
        factor = 1.5 * eye - 0.5 * p @ q
        p, q = factor @ p, q @ factor if step < steps - 1 else q
    return p * trace.rsqrt()


def eigen_inverse_sqrt(covariance: Tensor) -> Tensor:
    """Inverse square root [*, C, C] of symmetric positive definite matrices by eigendecomposition (ZCA): exact."""
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.rsqrt().unsqueeze(-2)) @ vectors.mT


class SwitchWhiten2d(nn.Module):
    r"""Switchable whitening: a learned mixture of whitening and normalising statistics, in groups of channels.

    .. math::
        y = \gamma \, \hat\Sigma^{-1/2} (x - \hat\mu) + \beta, \qquad
        \hat\mu = \sum_k w_k \mu_k, \quad \hat\Sigma = \sum_k w'_k \Sigma_k + \epsilon I

    with w and w' each a softmax over the candidates: batch whitening `bw` (mean and covariance of the group's channels
    over batch and positions), instance whitening `iw` (of each image), `bn` and `in` (the same with the covariance's
    diagonal alone) and `ln` (one mean and variance for all channels of an image). Batch statistics are running ones in
    evaluation; those start at mean 0 and covariance I, so that an untrained layer evaluates like a fresh BatchNorm.
    It compiles and exports (torch.export, ONNX); TorchScript and FX tracing cannot follow it.

    Args:
        num_features: Channels, a multiple of `group_size`.
        group_size: C, channels that are whitened together.
        candidates: What is mixed: any of `CANDIDATES`, without repetition.
        solver: `"newton"`, or `"eigen"` for the exact inverse square root.
        steps: Newton steps.
        eps: Added to the covariance's diagonal.
        momentum: Share of the new batch in the running statistics.

    Shape:
        - Input and output: [N, num_features, height, width].

    Raises:
        UsageError: If the channels are not a multiple of `group_size`, or a candidate or the solver is unknown; or, in
            `forward`, on another number of channels.

    Source:
        Pan et al. 2019, Switchable whitening for deep representation learning (arXiv 1904.09739).

    Example:
        >>> layer = SwitchWhiten2d(32)
        >>> y = layer(torch.randn(8, 32, 6, 6))
        >>> y.shape, layer.mean_logits.shape
        (torch.Size([8, 32, 6, 6]), torch.Size([2]))
    """

    track_running_stats = True
    """As BatchNorm's: whether training adds to the running statistics."""
    running_mean: Tensor
    running_cov: Tensor

    def __init__(
        self,
        num_features: int,
        *,
        group_size: int = 16,
        candidates: tuple[str, ...] = ("bw", "iw"),
        solver: Literal["newton", "eigen"] = "newton",
        steps: int = 5,
        eps: float = 1e-5,
        momentum: float = 0.01,
    ) -> None:
        super().__init__()
        if num_features % group_size:
            raise UsageError(f"{num_features} channels are no multiple of group_size={group_size}: choose a divisor.")
        if not candidates or not set(candidates) <= set(CANDIDATES) or len(set(candidates)) < len(candidates):
            raise UsageError(f"candidates takes some of {', '.join(CANDIDATES)}, each once, got {candidates}.")
        if solver not in ("newton", "eigen"):
            raise UsageError(f"Unknown solver {solver!r}: use 'newton' or 'eigen'.")
        self.num_features, self.group_size, self.candidates = num_features, group_size, tuple(candidates)
        self.solver, self.steps, self.eps, self.momentum = solver, steps, eps, momentum
        self.mean_logits = nn.Parameter(torch.ones(len(candidates)))
        self.cov_logits = nn.Parameter(torch.ones(len(candidates)))
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        groups = num_features // group_size
        self.register_buffer("running_mean", torch.zeros(groups, group_size))
        self.register_buffer("running_cov", torch.eye(group_size).repeat(groups, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Whitened `x`: see the class for shapes."""
        if x.dim() != 4 or x.shape[1] != self.num_features:
            raise UsageError(f"SwitchWhiten2d takes [N, {self.num_features}, height, width], got {list(x.shape)}.")
        images, channels, height, width = x.shape
        groups = channels // self.group_size
        # Statistics of half-precision activations need float32, as in any norm layer.
        # (There is no autocast to leave on the meta device.)
        with nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False):
            x_NGCP = x.reshape(images, groups, self.group_size, height * width)
            x_NGCP = x_NGCP if x.dtype == torch.float64 else x_NGCP.float()
            mean_NGC, cov_NGCC = self._mixed_statistics(x_NGCP)
            eye_CC = torch.eye(self.group_size, dtype=cov_NGCC.dtype, device=x.device)
            cov_NGCC = cov_NGCC + self.eps * eye_CC
            root_NGCC = (
                newton_inverse_sqrt(cov_NGCC, self.steps) if self.solver == "newton" else eigen_inverse_sqrt(cov_NGCC)
            )
            # Whitening and the affine map are one matrix and one offset for each image and group.
            map_NGCC = self.weight.view(groups, -1, 1) * root_NGCC
            offset_NGC = self.bias.view(groups, -1) - (map_NGCC @ mean_NGC.unsqueeze(-1)).squeeze(-1)
            map_NGCC, offset_NGC = map_NGCC.expand(images, -1, -1, -1), offset_NGC.expand(images, -1, -1)
            y_NGCP = torch.baddbmm(offset_NGC.flatten(0, 1).unsqueeze(-1), map_NGCC.flatten(0, 1), x_NGCP.flatten(0, 1))
        return y_NGCP.view(x.shape).to(x.dtype)

    def _mixed_statistics(self, x_NGCP: Tensor) -> tuple[Tensor, Tensor]:
        """Mixed mean [N or 1, G, C] and covariance [N or 1, G, C, C]."""
        names = self.candidates
        per_image = self.training or bool({"iw", "in", "ln"} & set(names))
        mean_NGC, cov_NGCC = _image_statistics(x_NGCP) if per_image else (x_NGCP, x_NGCP)  # unused where not computed
        batch_mean_GC, batch_cov_GCC = self.running_mean, self.running_cov
        if self.training and {"bw", "bn"} & set(names):
            batch_mean_GC = mean_NGC.mean(0)
            # Law of total covariance: the mean of the images' covariances and the covariance of their means.
            offset_NGC = mean_NGC - batch_mean_GC
            between_GCC = torch.einsum("ngc,ngd->gcd", offset_NGC, offset_NGC) / len(mean_NGC)
            batch_cov_GCC = cov_NGCC.mean(0) + between_GCC
            if self.track_running_stats:
                with torch.no_grad():
                    self.running_mean.lerp_(batch_mean_GC.to(self.running_mean.dtype), self.momentum)
                    self.running_cov.lerp_(batch_cov_GCC.to(self.running_cov.dtype), self.momentum)

        mean_weights = self.mean_logits.softmax(0).to(x_NGCP.dtype)
        cov_weights = self.cov_logits.softmax(0).to(x_NGCP.dtype)
        mixed_mean, mixed_cov = x_NGCP.new_zeros(()), x_NGCP.new_zeros(())
        for k, name in enumerate(names):
            if name in ("bw", "bn"):
                mean, cov = batch_mean_GC.to(x_NGCP.dtype).unsqueeze(0), batch_cov_GCC.to(x_NGCP.dtype).unsqueeze(0)
            elif name == "ln":
                mean, cov = _layer_statistics(mean_NGC, cov_NGCC)
            else:
                mean, cov = mean_NGC, cov_NGCC
            if name in ("bn", "in"):
                cov = torch.diag_embed(cov.diagonal(dim1=-2, dim2=-1))
            mixed_mean, mixed_cov = mixed_mean + mean_weights[k] * mean, mixed_cov + cov_weights[k] * cov
        return mixed_mean, mixed_cov

    def extra_repr(self) -> str:
        """What `print(model)` shows between the brackets."""
        return (
            f"{self.num_features}, group_size={self.group_size}, candidates={self.candidates}, solver={self.solver!r}"
        )


def _image_statistics(x_NGCP: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [N, G, C] and covariance [N, G, C, C] of each image's positions."""
    mean_NGC = x_NGCP.mean(-1)
    # E[xx'] - mm' would cancel where a channel's mean is far from zero.
    centred_NGCP = x_NGCP - mean_NGC.unsqueeze(-1)
    return mean_NGC, centred_NGCP @ centred_NGCP.mT / x_NGCP.shape[-1]


def _layer_statistics(mean_NGC: Tensor, cov_NGCC: Tensor) -> tuple[Tensor, Tensor]:
    """One mean and variance of all channels and positions of an image, as [N, G, C] and [N, 1, C, C]."""
    mean_N11 = mean_NGC.mean((1, 2), keepdim=True)
    within_NGC = cov_NGCC.diagonal(dim1=-2, dim2=-1)
    variance_N11 = (within_NGC + (mean_NGC - mean_N11).square()).mean((1, 2), keepdim=True)
    eye_CC = torch.eye(mean_NGC.shape[-1], dtype=cov_NGCC.dtype, device=cov_NGCC.device)
    return mean_N11.expand_as(mean_NGC), variance_N11.unsqueeze(-1) * eye_CC


def whiten_resnet(model: nn.Module, **kwargs: object) -> nn.Module:
    """Put switchable whitening into a timm ResNet, where its authors did.

    The stem's last norm, and in the first three stages the norm after the 3x3 convolution of every other block, the
    2nd, 4th and so on: 7 layers in resnet50, 15 in resnet101. Basic blocks have two 3x3 convolutions; there it is the
    norm after the first, which leaves the one before the residual sum as it was.

    Args:
        model: A timm ResNet (any of its block types), changed in place; the norms' affine parameters are kept.
        **kwargs: Arguments of `SwitchWhiten2d`.

    Returns:
        The same model.

    Raises:
        UsageError: If a norm to replace is not an `nn.BatchNorm2d`, or its channels do not divide into groups.
    """
    from timm.models.resnet import Bottleneck

    norms = ["bn1"]
    for stage in ("layer1", "layer2", "layer3"):
        for i, block in enumerate(getattr(model, stage, ())):  # features_only may end earlier
            if i % 2:
                norms.append(f"{stage}.{i}.{'bn2' if isinstance(block, Bottleneck) else 'bn1'}")
    replaced = {}
    for name in norms:
        norm = model.get_submodule(name)
        if not isinstance(norm, nn.BatchNorm2d):
            raise UsageError(f"{type(model).__name__}.{name} is a {type(norm).__name__}, not a BatchNorm2d.")
        with norm.weight.device:
            replaced[name] = SwitchWhiten2d(norm.num_features, **kwargs).to(norm.weight.dtype)  # type: ignore[arg-type]
        with torch.no_grad():
            replaced[name].weight.copy_(norm.weight)
            replaced[name].bias.copy_(norm.bias)
    for name, layer in replaced.items():
        model.set_submodule(name, layer)
    return model
