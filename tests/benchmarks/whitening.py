"""`SwitchWhiten2d` (Newton) beside a plain version that decomposes every covariance: time, ratio and difference.

    python tests/benchmarks/whitening.py

Forward and backward in training mode, taken alternately, on the shapes of resnet50's whitened layers at 224 pixels.
"""

import statistics
import time

import torch

from timm_etf.whitening import SwitchWhiten2d

SHAPES = ((32, 64, 112), (32, 64, 56), (32, 128, 28), (32, 256, 14))
ROUNDS = 7


def plain(layer: SwitchWhiten2d, x: torch.Tensor) -> torch.Tensor:
    """Batch and instance whitening as the definition says it, by eigendecomposition."""
    n, channels, height, width = x.shape
    size, positions = layer.group_size, height * width
    out = []
    mean_weights, cov_weights = layer.mean_logits.softmax(0), layer.cov_logits.softmax(0)
    for start in range(0, channels, size):
        group = x[:, start : start + size].reshape(n, size, positions)
        batch = group.transpose(0, 1).reshape(size, n * positions)
        batch_mean, batch_cov = batch.mean(1), torch.cov(batch, correction=0)
        means = group.mean(2)
        centred = group - means.unsqueeze(2)
        covs = centred @ centred.transpose(1, 2) / positions
        mean = mean_weights[0] * batch_mean + mean_weights[1] * means
        cov = cov_weights[0] * batch_cov + cov_weights[1] * covs + layer.eps * torch.eye(size)
        values, vectors = torch.linalg.eigh(cov)
        root = vectors @ torch.diag_embed(values.rsqrt()) @ vectors.transpose(1, 2)
        out.append(root @ (group - mean.unsqueeze(2)))
    y = torch.cat(out, dim=1).view(x.shape)
    return y * layer.weight.view(1, -1, 1, 1) + layer.bias.view(1, -1, 1, 1)


def seconds(run: object, x: torch.Tensor) -> float:
    """Seconds of one forward and backward pass."""
    started = time.perf_counter()
    run(x).square().mean().backward()  # type: ignore[operator]
    return time.perf_counter() - started


if __name__ == "__main__":
    print("| images, channels, side | eigendecomposition, ms | SwitchWhiten2d, ms | ratio | largest difference |")
    print("|---|---|---|---|---|")
    for images, channels, side in SHAPES:
        torch.manual_seed(0)
        layer = SwitchWhiten2d(channels)
        exact = SwitchWhiten2d(channels, steps=12)
        x = torch.randn(images, channels, side, side, requires_grad=True)
        difference = (exact(x) - plain(layer, x)).abs().max().item()
        pairs = [(seconds(lambda x, m=layer: plain(m, x), x), seconds(layer, x)) for _ in range(ROUNDS + 1)][1:]
        slow, fast = (1000 * statistics.median(column) for column in zip(*pairs, strict=True))
        ratio = statistics.median(f / s for s, f in pairs)
        print(
            f"| {images}, {channels}, {side} | {slow:.0f} | {fast:.0f} | {ratio:.2f} | {difference:.1e} |", flush=True
        )
