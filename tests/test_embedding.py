import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st

import timm_etf
from timm_etf import UsageError, embed, fix_classifier, frames
from timm_etf.embedding import Coordinates, isometry, weights_hash
from timm_etf.heads import FixedClassifier


def tiny(seed: int = 0, name: str = "test_resnet", num_classes: int = 10, **kwargs: object) -> torch.nn.Module:
    torch.manual_seed(seed)
    return timm.create_model(name, num_classes=num_classes, **kwargs)


def pixels(n: int, size: int = 32) -> torch.Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(7))


def headed(head: torch.nn.Module) -> torch.nn.Module:
    """A model that is nothing but its classifier."""
    net = torch.nn.Module()
    net.pretrained_cfg, net.fc = {"classifier": "fc"}, head
    return net


@given(
    num_classes=st.integers(2, 12),
    spare=st.integers(0, 20),
    seeds=st.tuples(*[st.integers(0, 2**32 - 1)] * 2),
    scale=st.floats(0.1, 50),
    normed=st.booleans(),
)
def test_coordinates_are_isometric_to_the_feature_within_the_span(
    num_classes: int, spare: int, seeds: tuple[int, int], scale: float, normed: bool
) -> None:
    """Whatever the width and rotation; and what is the same relative to two frames has the same coordinates."""
    found = []
    z = torch.randn(6, num_classes, dtype=torch.float64, generator=torch.Generator().manual_seed(seeds[0]))
    for seed, dim in zip(seeds, (num_classes - 1, num_classes + spare), strict=True):
        w = frames.simplex(num_classes, dim, seed=seed)
        span = torch.linalg.pinv(w) @ w
        inside = z @ isometry(w)  # the same place relative to the class vectors, in every space
        outside = torch.randn(6, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        h = inside + outside @ (torch.eye(dim) - span)
        vectors = Coordinates.of(headed(FixedClassifier(w * scale, feature_norm=normed)), strict=True)(h).double()
        met = torch.nn.functional.normalize(h) if normed else h
        isometric = vectors / (scale * (num_classes / (num_classes - 1)) ** 0.5)
        assert torch.allclose(isometric @ isometric.T, met @ span @ met.T, atol=1e-4, rtol=1e-4)
        assert torch.allclose(isometric, met @ isometry(w).T, atol=1e-5)
        found.append(torch.nn.functional.normalize(vectors))
    assert torch.allclose(*found, atol=1e-4)


@pytest.mark.parametrize("frame", ["orthoplex", "spherical_code", "gaussian"])
def test_other_frames_are_isometric_too(frame: str) -> None:
    num_classes, dim = {"orthoplex": (12, 8), "spherical_code": (20, 8), "gaussian": (5, 8)}[frame]
    h = torch.randn(6, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    systems, coordinates = set(), []
    for seed in (0, 1):
        w = frames.make(frame, num_classes, dim, seed=seed)
        of_net = Coordinates.of(headed(FixedClassifier(3 * w, frame=frame, seed=seed)))
        projected = h @ torch.linalg.pinv(w) @ w
        got = of_net(h).double()
        assert torch.allclose(got @ got.T, projected @ projected.T, atol=1e-4)
        turn = torch.linalg.lstsq(frames.make(frame, num_classes, dim, seed=0), w).solution
        coordinates.append(of_net(h @ turn))
        systems.add(of_net.system)
    if frame == "gaussian":  # whose cosines are each seed's own
        assert len(systems) == 2
    else:
        assert len(systems) == 1
        assert torch.allclose(*coordinates, atol=1e-4)


def test_a_simplex_gives_its_centred_logits_and_an_ordinary_classifier_too() -> None:
    x = pixels(5)
    for net in (fix_classifier(tiny(), logit_scale=16.0), fix_classifier(tiny(), feature_norm=True), tiny()):
        logits = net.eval()(x).detach()
        expected = torch.nn.functional.normalize(logits - logits.mean(1, keepdim=True))
        found = embed(net.train(), x)
        assert torch.allclose(found.vectors, expected, atol=1e-6)
        assert found.vectors.dtype == torch.float32
        assert torch.allclose(found.vectors.norm(dim=1), torch.ones(5))
        assert found.system.startswith("logits-10-" if net.fc.__class__ is torch.nn.Linear else "simplex-10-")


def test_a_convolutional_classifier_and_a_projector() -> None:
    conv = timm.create_model("mobilenetv3_small_050", num_classes=7)
    conv.classifier = torch.nn.Conv2d(conv.classifier.in_features, 7, 1)
    x = torch.rand(3, conv.classifier.in_channels)
    for head in (conv, fix_classifier(conv)):
        z = Coordinates.of(head)(x)
        logits = head.classifier(x[..., None, None]).flatten(1)
        assert torch.allclose(z, logits - logits.mean(1, keepdim=True), atol=1e-6)
    projected = fix_classifier(tiny(num_classes=200), projector="linear").eval()
    logits = projected(pixels(2)).detach()
    assert torch.allclose(
        embed(projected, pixels(2)).vectors, torch.nn.functional.normalize(logits - logits.mean(1, keepdim=True)),
        atol=1e-5,
    )  # fmt: skip


def test_types_and_batches() -> None:
    net = fix_classifier(tiny())
    x = pixels(5)
    full = embed(net, x)
    half, whole = embed(net, x, dtype=torch.float16), embed(net, x, dtype=torch.int8)
    assert (half.vectors.dtype, whole.vectors.dtype) == (torch.float16, torch.int8)
    assert torch.equal(half.vectors, full.vectors.half())
    assert torch.equal(whole.vectors.float(), (127 * full.vectors).round())
    loaded = embed(net, iter([(x[:2], torch.zeros(2)), (x[2:], torch.zeros(3))]))
    assert torch.allclose(loaded.vectors, full.vectors, atol=1e-6)
    assert loaded.system == half.system == full.system
    mean = full.vectors[:3].mean(0)
    centred = embed(net, x, mean=mean)
    assert torch.allclose(centred.vectors, torch.nn.functional.normalize(full.vectors - mean))
    assert centred.system == f"{full.system}-centred"
    pooled = embed(net, x, "features")
    features = net.forward_head(net.forward_features(x), pre_logits=True).detach()
    assert torch.allclose(pooled.vectors, torch.nn.functional.normalize(features), atol=1e-6)
    assert pooled.system == f"features-96-{weights_hash(net)[:12]}"


def named(net: torch.nn.Module, names: list[str]) -> torch.nn.Module:
    net.pretrained_cfg = net.pretrained_cfg | {"label_names": names}
    return net


def test_an_index_refuses_the_vectors_of_another_system() -> None:
    names = [f"class {k}" for k in range(10)]
    x = pixels(2)
    index = embed(named(fix_classifier(tiny(0), seed=0), names), x)
    same = embed(named(fix_classifier(tiny(1, "test_vit"), seed=1), names), pixels(2, 160))
    assert same.require(index.system) is same
    others = [
        named(fix_classifier(tiny(), seed=0), names[::-1]),  # another order
        named(fix_classifier(tiny(), seed=0), [*names[:-1], "other"]),
        fix_classifier(tiny(), seed=0),  # no names
        named(tiny(), names),  # no frame
    ]
    for other in others:
        with pytest.raises(UsageError, match=r"The index is in the coordinates simplex-10-\w{12} and these vectors"):
            embed(other, x).require(index.system)
    with pytest.raises(UsageError, match="features-96-"):
        embed(others[0], x, "features").require(index.system)


@given(num_classes=st.integers(3, 12), data=st.data())
def test_coordinates_among_some_classes_are_isometric(num_classes: int, data: st.DataObject) -> None:
    """To the feature within the span of their differences, where the classes are a simplex."""
    chosen = data.draw(st.permutations(range(num_classes)))[: data.draw(st.integers(2, num_classes))]
    w = frames.simplex(num_classes, 16, seed=1)
    h = torch.randn(6, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(num_classes))
    among = Coordinates.of(headed(FixedClassifier(w * 3)), strict=True).among([str(k) for k in chosen])
    apart = w[chosen[1:]] - w[chosen[0]]
    span = torch.linalg.pinv(apart) @ apart
    scale = 3 * (num_classes / (num_classes - 1)) ** 0.5
    z = among(h).double() / scale
    assert torch.allclose(z @ z.T, h @ span @ h.T, atol=1e-5)
    for place, k in enumerate(chosen):  # in the order that was asked for
        assert among(w[[k]]).argmax(1).item() == place


def test_a_model_of_more_classes_searches_an_index_of_fewer() -> None:
    names = [f"class {k}" for k in range(10)]
    x = pixels(3)
    old = embed(named(fix_classifier(tiny(0, num_classes=6), seed=0), names[6:0:-1]), x)
    new = named(fix_classifier(tiny(1, "test_vit"), seed=1), names)
    found = embed(new, pixels(3, 160), classes=names[6:0:-1])
    assert found.require(old.system).vectors.shape == (3, 6)
    with pytest.raises(UsageError, match="The index is in the coordinates simplex-6-"):
        embed(new, pixels(3, 160)).require(old.system)
    gaussian = named(fix_classifier(tiny(), frame="gaussian"), names)
    assert embed(gaussian, x, classes=names).system.startswith("gaussian-10-")
    assert embed(gaussian, x, classes=names[:6]).system == embed(named(tiny(), names), x, classes=names[:6]).system


def test_what_cannot_be_embedded_is_refused_in_one_line() -> None:
    x = pixels(2)
    damaged = tiny()
    torch.nn.init.constant_(damaged.fc.weight, float("nan"))
    cases = [
        (lambda: embed(tiny(), x, strict=True), "ordinary classifier and no frame: timm_etf.fix_classifier"),
        (lambda: embed(tiny(num_classes=0), x), "no classifier, and so no frame"),
        (lambda: embed(tiny(name="test_vit", features_only=True, num_classes=10), x), "names no classifier|no frame"),
        (lambda: embed(timm.create_model("deit_tiny_distilled_patch16_224", num_classes=3), x), "2 classifiers"),
        (lambda: embed(tiny(), x[:0]), "no images to embed"),
        (lambda: embed(tiny(), []), "no images to embed"),
        (lambda: embed(tiny(), x, mean=torch.zeros(9)), r"The mean has the shape \[9\], and these vectors have 10"),
        (lambda: embed(damaged, x), "not finite"),
        (lambda: embed(tiny(), x, classes=["3", "x", "y"]), "2 of the 3 classes are not among"),
        (lambda: embed(tiny(), x, classes=["3", "4", "3"]), "two classes or more, each given once; got 3"),
        (lambda: embed(tiny(), x, classes=["3"]), "two classes or more, each given once; got 1"),
        (lambda: embed(tiny(), x, "features", classes=["3", "4"]), "Features are not relative to classes"),
        (lambda: embed(tiny(), x, "logits"), "Unknown space 'logits'"),  # type: ignore[arg-type]
        (lambda: embed(tiny(), x, dtype=torch.float64), "float32, torch.float16 or torch.int8"),
    ]
    for call, message in cases:
        with pytest.raises(UsageError, match=message) as refused:
            call()
        assert "\n" not in str(refused.value)
    assert timm_etf.embed(fix_classifier(tiny()), x, strict=True).vectors.shape == (2, 10)
