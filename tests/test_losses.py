import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from timm_etf import FixedClassifier, UsageError, frames
from timm_etf.losses import DotRegressionLoss, FeatureEntropyLoss


@given(st.integers(1, 9), st.integers(2, 7), st.floats(0.1, 30), st.integers(0, 2**31))
@settings(deadline=None)
def test_dot_regression_against_its_equation(batch: int, num_classes: int, scale: float, seed: int) -> None:
    generator = np.random.default_rng(seed)
    logits = generator.standard_normal((batch, num_classes)) * scale
    targets = generator.integers(0, num_classes, batch)
    # Eq. 9 of Yang et al., sample by sample, with sqrt(E_W E_H) = scale.
    expected = np.mean([(logits[i, targets[i]] - scale) ** 2 / (2 * math.sqrt(scale * scale)) for i in range(batch)])
    loss = DotRegressionLoss(scale)
    assert loss(torch.from_numpy(logits), torch.from_numpy(targets)).item() == pytest.approx(expected, rel=1e-9)
    one_hot = torch.eye(num_classes, dtype=torch.float64)[torch.from_numpy(targets)]
    assert loss(torch.from_numpy(logits), one_hot).item() == pytest.approx(expected, rel=1e-9)
    # Mixed targets: the mixture of the losses.
    other = torch.from_numpy(generator.integers(0, num_classes, batch))
    mixed = 0.3 * one_hot + 0.7 * torch.eye(num_classes, dtype=torch.float64)[other]
    both = 0.3 * expected + 0.7 * loss(torch.from_numpy(logits), other).item()
    assert loss(torch.from_numpy(logits), mixed).item() == pytest.approx(both, rel=1e-9)


def test_dot_regression_pulls_along_the_own_direction_alone() -> None:
    # Its gradient with respect to the feature is -(1 - cos) w_y: no push from the other classes.
    w = frames.simplex(5, 8)
    h = nn.functional.normalize(torch.randn(1, 8, dtype=torch.float64), dim=1).requires_grad_()
    DotRegressionLoss()(h @ w.T, torch.tensor([2])).backward()
    expected = -(1 - (h @ w[2]).item()) * w[2]
    torch.testing.assert_close(h.grad[0], expected)


def test_dot_regression_is_zero_at_collapse() -> None:
    head = FixedClassifier(16 * frames.simplex(5, 8).float(), feature_norm=True)
    features = 3.7 * frames.simplex(5, 8).float()
    assert DotRegressionLoss(head.scale)(head(features), torch.arange(5)).item() == pytest.approx(0, abs=1e-9)
    with pytest.raises(UsageError, match="positive"):
        DotRegressionLoss(0)


@given(st.integers(2, 12), st.integers(1, 6), st.integers(0, 2**31))
@settings(deadline=None)
def test_feature_entropy_against_a_loop(batch: int, dim: int, seed: int) -> None:
    h = np.random.default_rng(seed).standard_normal((batch, dim)) + 0.3
    z = [row / np.linalg.norm(row) for row in h]
    total = 0.0
    for i in range(batch):
        nearest = min(np.linalg.norm(z[i] - z[j]) for j in range(batch) if j != i)
        total -= math.log(nearest + 1e-8)
    # In one dimension many directions are equal: rounding decides a distance near zero, so it is compared loosely.
    tolerance = 1e-9 if dim > 1 else 1e-3
    assert FeatureEntropyLoss()(torch.from_numpy(h)).item() == pytest.approx(total / batch, rel=tolerance)


def test_feature_entropy_spreads_features_and_survives_equal_ones() -> None:
    z = (torch.ones(8, 4) + 0.01 * torch.randn(8, 4)).requires_grad_()
    optimizer = torch.optim.SGD([z], lr=0.1)
    loss = FeatureEntropyLoss()
    losses = []
    for _ in range(200):
        optimizer.zero_grad()
        value = loss(z)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < losses[0] - 2
    equal = torch.ones(4, 3, requires_grad=True)
    loss(equal).backward()
    assert equal.grad.isfinite().all()
    assert loss(torch.randn(6, 3, 1, 1)).isfinite()
    with torch.autocast("cpu", torch.bfloat16):
        assert loss(torch.randn(6, 3, dtype=torch.bfloat16)).dtype == torch.float32
    with pytest.raises(UsageError, match="two samples"):
        loss(torch.randn(1, 3))
