import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from timm_etf import FixedClassifier, UsageError, frames
from timm_etf.heads import LearnedClassifier
from timm_etf.losses import DotRegressionLoss, FeatureEntropyLoss, NONLLoss, NTCELoss, gram_loss


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


def over_batch_by_hand(z: np.ndarray, y: np.ndarray, *, negatives_only: bool) -> float:
    """Sample by sample, as the equations are written."""
    total = 0.0
    for i in range(len(y)):
        others = [j for j in range(len(y)) if not (negatives_only and y[j] == y[i])]
        total -= z[i, y[i]] - (math.log(math.fsum(math.exp(z[j, y[i]]) for j in others)) if others else 0.0)
    return total / len(y)


@pytest.mark.parametrize("learned", [False, True])
@given(st.integers(1, 6), st.integers(2, 5), st.floats(0.05, 1), st.integers(0, 2**31))
@settings(deadline=None, max_examples=25)
def test_normface_is_the_cross_entropy_of_cosines(
    learned: bool, batch: int, num_classes: int, tau: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    h, w = rng.normal(size=(batch, 6)), rng.normal(size=(num_classes, 6))
    w /= np.linalg.norm(w, axis=1, keepdims=True)
    y = rng.integers(0, num_classes, batch)
    expected = 0.0
    for sample, label in zip(h, y, strict=True):
        z = [float(sample @ row) / np.linalg.norm(sample) / np.linalg.norm(row) / tau for row in w]
        expected += (math.log(math.fsum(math.exp(value) for value in z)) - z[label]) / batch
    rows, features, targets = torch.from_numpy(w), torch.from_numpy(h).requires_grad_(), torch.from_numpy(y)
    head: nn.Module = FixedClassifier(rows / tau, feature_norm=True)
    if learned:
        head = LearnedClassifier(rows, None, scale=1 / tau, feature_norm=True)
        head.weight.data *= 3  # whose norm must not count
    loss = nn.functional.cross_entropy
    assert loss(head(features), targets).item() == pytest.approx(expected, rel=1e-9)
    assert torch.autograd.gradcheck(lambda x: loss(head(x), targets), features)
    for over in (NTCELoss(), NONLLoss()):  # u and w of unit norm, through whatever the loss is
        assert torch.autograd.gradcheck(lambda x, over=over: over(head(x), targets), features)


OVER_BATCH = pytest.mark.parametrize("loss", [NTCELoss(), NONLLoss()], ids=lambda loss: type(loss).__name__)


@OVER_BATCH
@given(st.integers(1, 9), st.integers(2, 6), st.floats(0.05, 1), st.integers(0, 2**31))
@settings(deadline=None)
def test_losses_over_the_batch_against_their_equations(
    loss: NTCELoss, batch: int, num_classes: int, tau: float, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    z, y = generator.uniform(-1, 1, (batch, num_classes)) / tau, generator.integers(0, num_classes, batch)
    expected = over_batch_by_hand(z, y, negatives_only=isinstance(loss, NONLLoss))
    logits, targets = torch.from_numpy(z).requires_grad_(), torch.from_numpy(y)
    assert loss(logits, targets).item() == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert torch.autograd.gradcheck(lambda x: 3 * loss(x, targets), logits)


@OVER_BATCH
@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**31))
@settings(deadline=None)
def test_parts_of_a_batch_give_its_loss_and_gradient(loss: NTCELoss, size: int, parts: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    z = (8 * torch.randn(size * parts, 3, dtype=torch.float64, generator=generator)).requires_grad_()
    y = torch.randint(3, (size * parts,), generator=generator)
    whole = loss(z, y)
    (expected,) = torch.autograd.grad(whole, z)
    pairs = list(zip(z.split(size), y.split(size), strict=True))
    shared = loss.together(torch.stack([loss.statistics(*pair) for pair in pairs]))
    losses = torch.stack([loss(*pair, shared) for pair in pairs]).mean()
    torch.testing.assert_close(losses, whole)
    torch.testing.assert_close(torch.autograd.grad(losses, z)[0], expected)


@OVER_BATCH
def test_losses_over_the_batch_keep_their_precision_in_bf16(loss: NTCELoss) -> None:
    z = (torch.rand(64, 10) * 40 - 20).bfloat16().requires_grad_()
    y = torch.arange(64) % 10
    value = loss(z, y)
    value.backward()
    exact = z.detach().double().requires_grad_()
    reference = loss(exact, y)
    reference.backward()
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(reference.item(), rel=1e-6)
    torch.testing.assert_close(z.grad.double(), exact.grad, rtol=1e-2, atol=1e-6)  # as near as bf16 holds it
    z = torch.full((4, 3), 1e4, requires_grad=True)  # and where every exponential would be infinite
    loss(z, torch.tensor([0, 1, 1, 2])).backward()
    assert z.grad.isfinite().all()
    loss(z, torch.zeros(4, dtype=torch.int64)).backward()  # nothing to compare with
    assert z.grad.isfinite().all()


def gram_by_hand(h: np.ndarray, w: np.ndarray, targets: np.ndarray) -> float:
    """Cosine by cosine, as the equation is written; `targets` are probabilities."""
    total = 0.0
    for i in range(len(h)):
        for y in range(len(w)):
            for k in range(len(w)):
                cosine = h[i] @ w[k] / np.linalg.norm(h[i]) / np.linalg.norm(w[k])
                wanted = w[y] @ w[k] / np.linalg.norm(w[y]) / np.linalg.norm(w[k])
                total += targets[i, y] * (cosine - wanted) ** 2
    return total / len(h)


@given(st.integers(1, 4), st.integers(2, 6), st.integers(1, 7), st.integers(0, 2**31))
@settings(deadline=None, max_examples=30)
def test_the_distance_of_cosines_against_its_equation(batch: int, num_classes: int, dim: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    h, w = generator.standard_normal((batch, dim)), generator.standard_normal((num_classes, dim))
    y = generator.integers(0, num_classes, batch)
    features, frame = torch.from_numpy(h).requires_grad_(), torch.from_numpy(w)
    expected = gram_by_hand(h, w, np.eye(num_classes)[y])
    assert gram_loss(features, frame, torch.from_numpy(y)).item() == pytest.approx(expected, rel=1e-9, abs=1e-9)
    mixed = generator.dirichlet(np.ones(num_classes), batch)
    found = gram_loss(features[..., None, None], frame[..., None, None], torch.from_numpy(mixed))
    assert found.item() == pytest.approx(gram_by_hand(h, w, mixed), rel=1e-9, abs=1e-9)
    for targets in (torch.from_numpy(y), torch.from_numpy(mixed)):
        assert torch.autograd.gradcheck(lambda x, t=targets: gram_loss(x, frame, t), features)


def test_cosines_are_those_of_the_tree_where_each_feature_lies_along_its_vector() -> None:
    tree = frames.ClassTree(("a/x/1", "a/x/2", "a/y", "b/1", "b/2"))
    w, y = tree.frame(9), torch.arange(5)
    assert gram_loss(7 * w, 3 * w, y).item() == pytest.approx(0, abs=1e-12)
    # The nearer two classes are, the less it costs to take one for the other.
    cost = torch.stack([gram_loss(w[[0]], w, y[[k]]) for k in range(5)])
    assert (cost[1] < cost[2]).item()
    assert (cost[2] < cost[3]).item()
    assert cost[3].item() == pytest.approx(cost[4].item())
    with torch.autocast("cpu", torch.bfloat16):
        assert gram_loss(w.bfloat16(), w.float(), y).dtype == torch.float32


def test_among_the_vectors_of_a_simplex_all_errors_cost_alike() -> None:
    w = frames.simplex(5, 8)
    u = nn.functional.normalize(torch.randn(6, 8, dtype=torch.float64), dim=1)
    y = torch.arange(6) % 5
    span = torch.linalg.pinv(w) @ w
    expected = 5 / 4 * ((u - w[y]) @ span).square().sum(1).mean()
    torch.testing.assert_close(gram_loss(u, w, y), expected)
