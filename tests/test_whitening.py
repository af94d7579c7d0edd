import copy

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import timm_etf  # noqa: F401 - registers the variants
from timm_etf import UsageError
from timm_etf.whitening import CANDIDATES, SwitchWhiten2d, newton_inverse_sqrt, whiten_resnet


def exact(layer: SwitchWhiten2d, x: np.ndarray) -> np.ndarray:
    """The definition in float64 numpy, in training mode: image by image, group by group, eigenvalues."""
    size = layer.group_size
    mean_w, cov_w = (
        np.exp(v.detach().double().numpy()) / np.exp(v.detach().double().numpy()).sum()
        for v in (layer.mean_logits, layer.cov_logits)
    )
    out = np.empty_like(x)
    for start in range(0, x.shape[1], size):
        batch = x[:, start : start + size].swapaxes(0, 1).reshape(size, -1)
        for n in range(len(x)):
            image = x[n, start : start + size].reshape(size, -1)
            everything = x[n]
            statistics = {
                "bw": (batch.mean(1), np.cov(batch, ddof=0)),
                "iw": (image.mean(1), np.cov(image, ddof=0)),
                "bn": (batch.mean(1), np.diag(batch.var(1))),
                "in": (image.mean(1), np.diag(image.var(1))),
                "ln": (np.full(size, everything.mean()), everything.var() * np.eye(size)),
            }
            mean = sum(w * statistics[name][0] for w, name in zip(mean_w, layer.candidates, strict=True))
            cov = sum(w * statistics[name][1] for w, name in zip(cov_w, layer.candidates, strict=True))
            values, vectors = np.linalg.eigh(cov + layer.eps * np.eye(size))
            root = vectors @ np.diag(values**-0.5) @ vectors.T
            out[n, start : start + size] = (root @ (image - mean[:, None])).reshape(size, *x.shape[2:])
    affine = (-1, 1, 1)
    return out * layer.weight.detach().double().numpy().reshape(affine) + layer.bias.detach().numpy().reshape(affine)


@pytest.mark.parametrize("solver", ["newton", "eigen"])
@pytest.mark.parametrize(
    "candidates", [("bw", "iw"), ("bw", "iw", "ln"), CANDIDATES, *((name,) for name in CANDIDATES)]
)
def test_against_the_definition(candidates: tuple[str, ...], solver: str) -> None:
    torch.manual_seed(1)
    layer = SwitchWhiten2d(8, group_size=4, candidates=candidates, solver=solver, steps=25).double()
    with torch.no_grad():  # no candidate's weight equals another's: exchanged ones would show
        layer.mean_logits.copy_(torch.randn(len(candidates)))
        layer.cov_logits.copy_(torch.randn(len(candidates)))
        layer.weight.copy_(torch.randn(8))
        layer.bias.copy_(torch.randn(8))
    x = torch.randn(3, 8, 5, 4, dtype=torch.float64) @ torch.randn(4, 4, dtype=torch.float64) + 3
    x = torch.einsum("dc,nchw->ndhw", torch.randn(8, 8, dtype=torch.float64), x)
    np.testing.assert_allclose(layer(x).detach().numpy(), exact(layer, x.numpy()), atol=1e-6)


@given(st.integers(1, 16), st.floats(0, 3), st.integers(0, 2**31))
@settings(deadline=None)
def test_newton_converges_to_the_inverse_square_root(size: int, decades: float, seed: int) -> None:
    generator = np.random.default_rng(seed)
    q = np.linalg.qr(generator.standard_normal((size, size))).Q
    values = 10 ** generator.uniform(-decades, 0, size)
    covariance = (q * values) @ q.T
    inverse_root = (q / np.sqrt(values)) @ q.T
    error = [
        np.abs(newton_inverse_sqrt(torch.from_numpy(covariance), steps).numpy() - inverse_root).max()
        for steps in (2, 5, 25)
    ]
    assert error[2] < 1e-9 * np.abs(inverse_root).max()
    assert error[2] <= error[1] + 1e-12
    assert error[1] <= error[0] + 1e-12


def test_five_steps_whiten_what_is_not_far_from_white() -> None:
    # Their error is in the directions of small variance, which stay smaller than they would be: stated, not hidden.
    values = torch.tensor([1.0, 0.5, 0.25, 0.1, 0.01], dtype=torch.float64)
    whitened = newton_inverse_sqrt(torch.diag(values), 5).diagonal().square() * values
    assert whitened[:3].sub(1).abs().max() < 0.02
    assert 0.1 < whitened[4] < 0.9


@pytest.mark.parametrize("candidates", [("bw", "iw"), CANDIDATES])
@pytest.mark.parametrize("solver", ["newton", "eigen"])
def test_gradients(candidates: tuple[str, ...], solver: str) -> None:
    torch.manual_seed(0)
    layer = SwitchWhiten2d(6, group_size=3, candidates=candidates, solver=solver).double()
    x = torch.randn(2, 6, 3, 2, dtype=torch.float64, requires_grad=True)
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def output(x: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(copy.deepcopy(layer), dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(output, (x, *(p.detach().requires_grad_() for p in parameters)))


def test_batch_whitening_whitens() -> None:
    layer = SwitchWhiten2d(32, candidates=("bw",), steps=20)
    x = torch.einsum("dc,nchw->ndhw", torch.randn(32, 32), torch.randn(64, 32, 6, 6)) + 5
    y = layer(x).transpose(0, 1).flatten(1)
    for group in y.split(16):
        assert group.mean(1).abs().max() < 1e-3
        torch.testing.assert_close(torch.cov(group), torch.eye(16), atol=0.02, rtol=0)


def test_running_statistics_approach_the_data_and_are_what_evaluation_uses() -> None:
    layer = SwitchWhiten2d(16, momentum=0.1, candidates=("bw",), steps=25)
    mix = torch.randn(16, 16)
    for _ in range(200):
        layer(torch.einsum("dc,nchw->ndhw", mix, torch.randn(32, 16, 4, 4)) + 2)
    torch.testing.assert_close(layer.running_cov[0], mix @ mix.T, atol=0.1 * (mix @ mix.T).max().item(), rtol=0)
    assert (layer.running_mean - 2).abs().max() < 0.5
    layer.eval()
    one = torch.einsum("dc,nchw->ndhw", mix, torch.randn(1, 16, 4, 4)) + 2
    before = layer.running_cov.clone()
    alone, together = layer(one), layer(torch.cat([one, one + 9]))[:1]
    torch.testing.assert_close(alone, together, atol=1e-4, rtol=1e-4)  # no image depends on the others
    assert torch.equal(layer.running_cov, before)


@pytest.mark.parametrize("candidates", [("bw",), ("bw", "iw"), CANDIDATES])
def test_evaluation_before_any_training_is_sane(candidates: tuple[str, ...]) -> None:
    layer = SwitchWhiten2d(32, candidates=candidates).eval()
    x = torch.randn(4, 32, 8, 8)
    y = layer(x)
    if candidates == ("bw",):  # like a fresh BatchNorm: mean 0 and covariance I
        torch.testing.assert_close(y, x, atol=0, rtol=0.02)  # five Newton steps from the identity's trace
    assert y.isfinite().all()
    assert 0.5 < y.std() < 2


@pytest.mark.parametrize("shape", [(1, 16, 4, 4), (4, 16, 1, 1), (1, 16, 1, 1)])
def test_degenerate_batches_stay_finite(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, requires_grad=True)
    y = SwitchWhiten2d(16)(x)
    y.square().sum().backward()
    assert y.isfinite().all()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_half_precision_keeps_its_statistics_in_float32() -> None:
    torch.manual_seed(0)
    layer = SwitchWhiten2d(32)
    x = torch.randn(8, 32, 6, 6) * 3 + 20
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x.bfloat16())
    assert y.dtype == torch.bfloat16
    expected = copy.deepcopy(layer)(x.bfloat16().float())
    assert (y.float() - expected).abs().max() < 0.05
    torch.testing.assert_close(layer.to(torch.bfloat16)(x.bfloat16()).float(), expected, atol=0.2, rtol=0.1)


def test_bad_arguments_name_the_fix() -> None:
    for kwargs, says in (
        ({"num_features": 24}, "no multiple of group_size=16"),
        ({"candidates": ("bw", "gn")}, "bw, iw, bn, in, ln"),
        ({"candidates": ("bw", "bw")}, "each once"),
        ({"candidates": ()}, "takes some of"),
        ({"solver": "svd"}, "'newton' or 'eigen'"),
    ):
        with pytest.raises(UsageError, match=says):
            SwitchWhiten2d(**{"num_features": 32, **kwargs})
    for shape in ((2, 32, 4, 4), (2, 16, 4)):
        with pytest.raises(UsageError, match=r"takes \[N, 16, height, width\]"):
            SwitchWhiten2d(16)(torch.zeros(shape))
    with pytest.raises(UsageError, match="not a BatchNorm2d"):
        whiten_resnet(timm.create_model("resnet50_gn", num_classes=2))


@pytest.mark.parametrize(("name", "layers"), [("resnet50", 7), ("resnet101", 15)])
def test_placement_is_the_authors(name: str, layers: int) -> None:
    with torch.device("meta"):
        net = timm.create_model(f"{name}_sw", num_classes=10)
    found = [n for n, m in net.named_modules() if isinstance(m, SwitchWhiten2d)]
    assert len(found) == layers
    assert found[0] == "bn1"
    assert all(n.endswith(".bn2") and int(n.split(".")[1]) % 2 == 1 and n[:6] != "layer4" for n in found[1:])


@pytest.mark.slow
def test_every_sw_variant_builds_and_steps() -> None:
    names = timm.list_models("*_sw")
    assert len(names) == len(timm.list_models("*_sw_etf")) > 70
    with torch.device("meta"):
        for name in names[::6]:  # all of them: tests/sweep_variants.py '*_sw'
            net = timm.create_model(name, num_classes=10)
            blocks = sum(len(stage) // 2 for stage in (net.layer1, net.layer2, net.layer3))
            assert sum(isinstance(m, SwitchWhiten2d) for m in net.modules()) == 1 + blocks
            logits = net(torch.zeros(2, *net.pretrained_cfg["input_size"]))
            logits.sum().backward()
            assert all(p.grad is not None for p in net.parameters())
            assert not any(k.startswith("fc.") for k, _ in timm.create_model(f"{name}_etf").named_parameters())


def test_a_resnet50_step_runs_at_224_pixels() -> None:
    torch.manual_seed(0)
    net = timm.create_model("resnet50_sw_etf", num_classes=1000)
    images, targets = torch.randn(2, 3, 224, 224), torch.tensor([1, 2])
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    losses = []
    for _ in range(2):
        loss = nn.functional.cross_entropy(net(images), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    assert losses[1] < losses[0]


def test_timms_arguments_and_weights_behave_as_for_the_base(tmp_path: object) -> None:
    net = timm.create_model("resnet18_sw", num_classes=10, in_chans=1, sw_kwargs={"candidates": ("bw", "ln")})
    assert net.bn1.candidates == ("bw", "ln")
    features = timm.create_model("resnet18_sw", features_only=True, out_indices=(1, 2))
    assert [f.shape[1] for f in features(torch.randn(1, 3, 64, 64))] == [64, 128]
    assert sum(isinstance(m, SwitchWhiten2d) for m in features.modules()) == 3
    torch.save(net.state_dict(), f"{tmp_path}/w.pth")
    overlay = {"file": f"{tmp_path}/w.pth", "num_classes": 10, "input_size": (1, 224, 224)}
    again = timm.create_model(
        "resnet18_sw",
        pretrained=True,
        pretrained_cfg_overlay=overlay,
        num_classes=10,
        in_chans=1,
        sw_kwargs={"candidates": ("bw", "ln")},
    )
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in net.state_dict().items())
    backbone = timm.create_model(
        "resnet18_sw_etf",
        pretrained=True,
        pretrained_cfg_overlay=overlay,
        num_classes=7,
        in_chans=1,
        sw_kwargs={"candidates": ("bw", "ln")},
    )
    assert torch.equal(backbone.bn1.running_cov, net.bn1.running_cov)
    assert backbone.fc.frame == "simplex"
    with pytest.raises(UsageError, match="No pretrained weights exist for resnet50_sw"):
        timm.create_model("resnet50_sw", pretrained=True)
