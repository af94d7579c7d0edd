from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from sklearn.linear_model import LogisticRegression

from timm_etf import UsageError
from timm_etf.transfer import Features, Probe, extract, linear_probe, paired_difference
from timm_etf.transfer.probe import _fifth_of_every_class, fit_logistic


def blobs(n: int, seed: int, num_classes: int = 4, dim: int = 20) -> Features:
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(0).normal(size=(num_classes, dim))
    y = np.arange(n) % num_classes
    x = (centres[y] + rng.normal(size=(n, dim))).astype(np.float32)
    return Features(x, y, {str(k): k for k in range(num_classes)})


@pytest.mark.parametrize("weight_decay", [1e-1, 1e-2, 1e-3])
def test_logistic_regression_is_scikit_learns(weight_decay: float) -> None:
    data = blobs(300, seed=1)
    x, y = data.x.astype(np.float64), data.y
    weights = fit_logistic(torch.from_numpy(x), torch.from_numpy(y), 4, weight_decay).numpy()
    theirs = LogisticRegression(C=1 / (weight_decay * len(x)), tol=1e-10, max_iter=10_000).fit(x, y)

    def objective(w: np.ndarray, b: np.ndarray) -> float:
        logits = x @ w.T + b
        top = logits.max(axis=1)
        log_z = np.log(np.exp(logits - top[:, None]).sum(axis=1)) + top
        return (log_z - logits[np.arange(len(y)), y]).mean() + weight_decay / 2 * (w**2).sum()

    ours = objective(weights[:, :-1], weights[:, -1])
    assert ours == pytest.approx(objective(theirs.coef_, theirs.intercept_), abs=1e-6)
    assert ((x @ weights[:, :-1].T + weights[:, -1]).argmax(1) == theirs.predict(x)).mean() > 0.995


def test_probe_separates_what_is_separable_and_not_what_is_not() -> None:
    result = linear_probe(blobs(400, seed=1), blobs(200, seed=2))
    assert result.accuracy > 95
    low, high = result.interval()
    assert low <= result.accuracy <= high
    shuffled = blobs(400, seed=1)
    noise = Features(shuffled.x, np.random.default_rng(0).permutation(shuffled.y), shuffled.class_to_idx)
    assert linear_probe(noise, blobs(200, seed=2)).accuracy < 60


def test_scale_and_constant_features_do_not_matter() -> None:
    train, test = blobs(400, seed=1), blobs(200, seed=2)

    def changed(f: Features) -> Features:
        x = np.concatenate([1000 * f.x + 7, np.full((len(f.x), 2), 3, np.float32)], axis=1)
        return Features(x, f.y, f.class_to_idx)

    same = linear_probe(train, test).correct == linear_probe(changed(train), changed(test)).correct
    assert same.mean() > 0.99


def test_validation_fifth() -> None:
    y = np.repeat(np.arange(5), [1, 2, 3, 10, 50])
    held = _fifth_of_every_class(np.random.default_rng(0).permutation(y), seed=0)
    labels = np.random.default_rng(0).permutation(y)[held]
    assert np.bincount(labels, minlength=5).tolist() == [0, 0, 1, 2, 10]


def test_paired_difference_is_paired() -> None:
    rng = np.random.default_rng(0)
    a = rng.random(2000) < 0.7
    b = a.copy()
    b[np.flatnonzero(~a)[:20]] = True  # one point better, on the same images
    mean, (low, high) = paired_difference(Probe(a, 0.1, 2), Probe(b, 0.1, 2))
    assert mean == pytest.approx(1.0)
    assert 0.5 < low < 1 < high < 1.5  # unpaired it would be about 1 +- 2.8
    # The interval against the normal one.
    se = 100 * (b.astype(float) - a).std() / 2000**0.5
    assert (high - low) == pytest.approx(2 * 1.96 * se, rel=0.15)


def test_different_classes_are_refused() -> None:
    test = blobs(20, seed=2)
    with pytest.raises(UsageError, match="only one has extra"):
        linear_probe(blobs(40, seed=1), Features(test.x, test.y, {**test.class_to_idx, "extra": 4}))


def test_extract_gives_what_the_classifier_receives(images: Path) -> None:
    torch.manual_seed(0)
    net = timm.create_model("test_resnet", num_classes=10)
    features = extract(net, images, "validation", workers=0, batch_size=8)
    assert features.x.shape == (37, 96)
    assert features.x.dtype == np.float32
    assert np.bincount(features.y).tolist() == [7, 8, 7, 8, 7]
    dataset = timm.data.create_dataset("", root=str(images / "validation"))
    dataset.transform = timm.data.create_transform(**timm.data.resolve_data_config(model=net))
    received = []
    net.fc.register_forward_pre_hook(lambda module, inputs: received.append(inputs[0]))
    with torch.no_grad():
        net.eval()(dataset[20][0][None])
    np.testing.assert_allclose(received[0][0].numpy(), features.x[20], atol=1e-5)


def test_extract_says_what_is_wrong(images: Path) -> None:
    net = timm.create_model("test_resnet", num_classes=0)
    with pytest.raises(UsageError, match=r"No folder .*test"):
        extract(net, images, "test")
    torch.nn.init.constant_(net.conv1[0].weight, float("nan"))
    with pytest.raises(UsageError, match="are not finite"):
        extract(net, images, "validation", workers=0)
