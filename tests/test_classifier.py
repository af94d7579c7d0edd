import copy
import io
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from tests import commands
from timm_etf import FixedClassifier, UsageError, fix_classifier, frames, free_classifier
from timm_etf.classifier import fixed_classifiers


def model(name: str = "test_resnet", **kwargs: object) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=10, **kwargs)


def test_fixed_stays_fixed_through_training() -> None:
    net = fix_classifier(model()).train()
    before = net.fc.weight.clone()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5, momentum=0.9, weight_decay=0.1)
    for _ in range(3):
        loss = nn.functional.cross_entropy(net(torch.randn(4, 3, 64, 64)), torch.arange(4))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert torch.equal(net.fc.weight, before)
    assert torch.equal(net.fc.bias, torch.zeros(10))
    assert not [n for n, _ in net.named_parameters() if n.startswith("fc")]
    assert frames.is_simplex(net.fc.weight)


def test_logits_are_the_products_with_the_frame() -> None:
    net = fix_classifier(model(), seed=5).eval()
    x = torch.randn(2, 3, 64, 64)
    features = net.forward_head(net.forward_features(x), pre_logits=True).double()
    expected = features @ frames.simplex(10, 96, seed=5).T
    torch.testing.assert_close(net(x).double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["test_resnet", "dla46_c", "test_vit"])
def test_free_keeps_logits_and_trains_again(name: str) -> None:
    net = fix_classifier(model(name)).eval()
    x = torch.randn(2, 3, *net.pretrained_cfg["input_size"][1:])
    with torch.no_grad():
        fixed = net(x)
        state = torch.get_rng_state()
        freed = free_classifier(net)(x)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(fixed, freed)
    head = net.get_classifier()
    assert isinstance(head, nn.Linear | nn.Conv2d)
    assert head.weight.requires_grad
    assert not list(fixed_classifiers(net))


def test_reset_classifier_keeps_timms_meaning() -> None:
    net = fix_classifier(model())
    net.reset_classifier(7)
    assert isinstance(net.fc, nn.Linear)
    assert net.fc.weight.shape == (7, 96)
    assert net.fc.weight.requires_grad
    fix_classifier(net)
    assert isinstance(net.fc, FixedClassifier)
    assert frames.coherence(net.fc.weight) == pytest.approx(-1 / 6, abs=1e-6)


def test_refixing_changes_the_frame() -> None:
    net = fix_classifier(model(), seed=1)
    first = net.fc.weight.clone()
    assert not torch.equal(fix_classifier(net, seed=2).fc.weight, first)
    assert torch.equal(fix_classifier(net, seed=1).fc.weight, first)


def test_learned_weights_cannot_replace_the_frame() -> None:
    plain, net = model(), fix_classifier(model())
    frame = net.fc.weight.clone()
    with pytest.raises(RuntimeError, match=r"fc\.weight is no simplex frame.*fix_classifier\(model\)"):
        net.load_state_dict(plain.state_dict())
    assert torch.equal(net.fc.weight, frame)
    biased = {**net.state_dict(), "fc.bias": torch.ones(10)}
    with pytest.raises(RuntimeError, match=r"fc\.bias is not zero.*fix_classifier\(model\)"):
        net.load_state_dict(biased)


def test_a_bias_that_something_wrote_is_freed_with_the_weight() -> None:
    net = fix_classifier(model()).eval()
    nn.init.constant_(net.fc.bias, -2)  # as train.py --head-init-bias does
    x = torch.randn(2, 3, 64, 64)
    expected = net(x)
    assert torch.equal(free_classifier(net)(x), expected)


def test_another_rotation_loads_and_is_no_longer_called_this_seed() -> None:
    net, other = fix_classifier(model(), seed=0), fix_classifier(model(), seed=3)
    net.load_state_dict(fix_classifier(model(), seed=0).half().state_dict())
    assert net.fc.seed == 0
    net.load_state_dict(other.state_dict())
    assert net.fc.seed is None
    assert torch.equal(net.fc.weight, other.fc.weight)


VARIETY = [
    {},
    {"feature_norm": True, "logit_scale": 12.0, "projector": "mlp", "learn_scale": True},
    {"frame": "learned", "feature_norm": True, "logit_scale": 12.0},
]


@pytest.mark.parametrize("options", VARIETY, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_moves_copies_traces_and_exports(dtype: torch.dtype, options: dict[str, object]) -> None:
    net = fix_classifier(model().to(dtype), **options).eval()
    x = torch.randn(2, 3, 64, 64, dtype=dtype)
    with torch.no_grad():
        expected = net(x)
        assert net.fc.weight.dtype == expected.dtype == dtype
        assert torch.equal(copy.deepcopy(net)(x), expected)
        assert torch.equal(torch.fx.symbolic_trace(net)(x), expected)
        assert torch.equal(torch.export.export(net, (x,)).module()(x), expected)
        channels_last = copy.deepcopy(net).to(memory_format=torch.channels_last)
        torch.testing.assert_close(channels_last(x.contiguous(memory_format=torch.channels_last)), expected)


@pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated")
@pytest.mark.parametrize("options", VARIETY, ids=str)
@pytest.mark.parametrize("name", ["test_resnet", "dla46_c"])
def test_scripts(name: str, options: dict[str, object]) -> None:
    torch.manual_seed(0)
    net = fix_classifier(timm.create_model(name, num_classes=10, scriptable=True), **options).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        scripted = torch.jit.script(net)
        torch.testing.assert_close(scripted(x), net(x))
        assert scripted.state_dict().keys() == net.state_dict().keys()  # what train.py --torchscript saves
        assert scripted.double()(x.double()).dtype == torch.float64
        net.float()  # whose tensors it shares
        saved = io.BytesIO()
        torch.save(net, saved)  # a pickle of the whole module: for a user's own use, nothing here writes one
        saved.seek(0)
        assert torch.equal(torch.load(saved, weights_only=False)(x), net(x))


@pytest.mark.parametrize(
    "options",
    [pytest.param(o, marks=pytest.mark.slow) if o else o for o in VARIETY],
    ids=str,
)
def test_compiles_as_one_graph(options: dict[str, object]) -> None:
    net = fix_classifier(model(), **options).train()
    plain, compiled = copy.deepcopy(net), torch.compile(net, backend="aot_eager", fullgraph=True)
    x = torch.randn(4, 3, 64, 64)
    for run in (plain, compiled):
        nn.functional.cross_entropy(run(x), torch.arange(4)).backward()
    for ours, theirs in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-4, rtol=1e-3)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("options", VARIETY[1:2], ids=str)
def test_onnx_gives_the_same_logits(options: dict[str, object], tmp_path: Path) -> None:
    import onnxruntime

    net = fix_classifier(model(), **options).eval()
    x = torch.randn(2, 3, 64, 64)
    torch.onnx.export(net, (x,), str(tmp_path / "model.onnx"), dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    [logits] = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), net(x), atol=1e-4, rtol=1e-4)


DDP = """
import os, torch, timm, timm_etf
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)
net = timm.create_model("test_resnet_etf", num_classes=10)
ddp = DistributedDataParallel(net)
frame = net.fc.weight.clone()
if rank == 1:
    net.fc.weight[0, 0] += 1  # so that a broadcast would show
    net.bn1.running_mean += 5  # which DDP is to undo
x, y = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(rank)), torch.arange(4)
torch.nn.functional.cross_entropy(ddp(x), y).backward()
assert torch.equal(net.fc.weight, frame) == (rank == 0), "the frame was sent"
assert net.bn1.running_mean.abs().max() < 4, "other buffers are still sent"
grads = [torch.zeros_like(net.conv1[0].weight) for _ in range(2)]
dist.all_gather(grads, net.conv1[0].weight.grad)
assert torch.equal(*grads)

# A fresh trainable classifier has the same names, and its gradients must be exchanged.
net.reset_classifier(10)
with torch.no_grad():
    net.fc.weight += rank
ddp = DistributedDataParallel(net)
torch.nn.functional.cross_entropy(ddp(x), y).backward()
for tensor in (net.fc.weight.detach(), net.fc.weight.grad):
    both = [torch.zeros_like(tensor) for _ in range(2)]
    dist.all_gather(both, tensor.contiguous())
    assert torch.equal(*both)
del ddp  # while the group is there: its threads end with it
dist.barrier()
dist.destroy_process_group()
print("done", rank)
"""


def test_two_processes_do_not_send_the_frame_but_a_trainable_classifier() -> None:
    assert [done.stdout for done in commands.run_ranks(2, code=DDP)] == ["done 0\n", "done 1\n"]


def test_ema_covers_the_frame() -> None:
    net = fix_classifier(model(), learn_scale=True)
    ema = timm.utils.ModelEmaV3(net, decay=0.5)
    with torch.no_grad():
        net.conv1[0].weight.add_(1)
    ema.update(net)
    assert torch.equal(ema.module.fc.weight, net.fc.weight)
    assert not torch.equal(ema.module.conv1[0].weight, net.conv1[0].weight)


def test_models_without_a_classifier_say_so() -> None:
    with pytest.raises(UsageError, match="num_classes=N"):
        fix_classifier(timm.create_model("test_resnet", num_classes=0))
    with pytest.raises(UsageError, match="not features_only"):
        fix_classifier(timm.create_model("test_resnet", features_only=True))
    net = timm.create_model("test_resnet", num_classes=10)
    net.fc = nn.Bilinear(96, 96, 10)
    with pytest.raises(
        UsageError,
        match=r"is a torch\.nn\.modules\.linear\.Bilinear; only torch\.nn\.Linear",
    ):
        fix_classifier(net)


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"frame": "simplex"}, "at most 97 classes"),
        ({"frame": "simplx"}, "Unknown frame"),
        ({"frame": torch.eye(200, 96)}, r"must have the shape \[200, 96\] and rows of one norm"),
        ({"frame": torch.ones(200, 95)}, r"must have the shape \[200, 96\] and rows of one norm"),
        ({"frame": torch.full((200, 96), torch.nan)}, "rows of one norm"),
        ({"frame": frames.ClassTree(("a/b", "a/c"))}, "The tree has 2 classes and the model 200"),
        ({"logit_scale": 0}, "logit_scale must be a positive number"),
        ({"logit_scale": float("nan")}, "logit_scale must be a positive number"),
        ({"logit_scale": float("inf")}, "logit_scale must be a positive number"),
        ({"logit_scale": "4"}, "logit_scale must be a positive number, got '4'"),
        ({"seed": 2**70}, "at most 64 bits"),
        ({"seed": "3"}, "The seed of a frame is a whole number, got '3'"),
        ({"seed": True}, "The seed of a frame is a whole number, got True"),
        ({"seed": 1.0, "frame": "learned"}, "The seed of a frame is a whole number, got 1.0"),
        ({"feature_norm": "yes"}, "feature_norm must be True or False, got 'yes'"),
        ({"learn_scale": "no"}, "learn_scale must be True or False, got 'no'"),
        ({"learn_scale": 0}, "learn_scale must be True or False, got 0"),
        ({"projector": "mlpp"}, "None, 'linear' or 'mlp'"),
        ({"frame": "learned", "learn_scale": True}, "leave out learn_scale"),
    ],
)
def test_what_does_not_fit_changes_nothing(kwargs: dict[str, object], says: str) -> None:
    net = timm.create_model("test_resnet", num_classes=200)
    with pytest.raises(UsageError, match=says):
        fix_classifier(net, **kwargs)
    assert isinstance(net.fc, nn.Linear)


@pytest.mark.parametrize(
    ("num_classes", "frame"),
    [(96, "simplex"), (97, "simplex"), (98, "orthoplex"), (192, "orthoplex"), (193, "spherical_code")],
)
def test_any_number_of_classes_fits(num_classes: int, frame: str) -> None:
    net = fix_classifier(timm.create_model("test_resnet", num_classes=num_classes))
    assert net.fc.frame == frame
    other = fix_classifier(timm.create_model("test_resnet", num_classes=num_classes), seed=5)
    other.load_state_dict(net.state_dict())  # another rotation of the same frame
    assert torch.equal(other.fc.weight, net.fc.weight)
    assert other.fc.seed is None
    with pytest.raises(RuntimeError, match=f"no {frame} frame"):
        other.load_state_dict(timm.create_model("test_resnet", num_classes=num_classes).state_dict())


@pytest.mark.parametrize("name", sorted(frames.FRAMES))
def test_every_frame_by_name(name: str) -> None:
    num_classes = {"orthoplex": 120, "spherical_code": 200}.get(name, 50)
    net = fix_classifier(timm.create_model("test_resnet", num_classes=num_classes), name, 3)
    assert torch.equal(net.fc.weight, frames.make(name, num_classes, 96, seed=3).float())
    assert (net.fc.frame, net.fc.seed) == (name, 3)


OPTIONS = [
    {"logit_scale": 16.0},
    {"feature_norm": True, "logit_scale": 12.5},
    {"learn_scale": True, "logit_scale": 3.0},
    {"projector": "linear"},
    {"projector": "mlp", "feature_norm": True, "learn_scale": True},
    {"frame": "learned", "logit_scale": 4.0},
    {"frame": "learned", "feature_norm": True, "logit_scale": 12.0},
    {"frame": "learned", "projector": "mlp"},
]


def reference(net: nn.Module, x: torch.Tensor, options: dict[str, object]) -> torch.Tensor:
    """The logits by their definition, in float64."""
    net = copy.deepcopy(net).double().eval()
    conv = hasattr(net, "get_classifier") and net.get_classifier().is_conv
    head = net.get_classifier()
    h = net.forward_head(net.forward_features(x.double()), pre_logits=True)
    if head.projector is not None:
        h = head.projector(h.unflatten(1, (-1, 1, 1)) if conv and h.dim() == 2 else h)
    h = h.flatten(1)
    w = head.weight.flatten(1)
    scale = options.get("logit_scale", 1.0)
    if options.get("frame") != "learned":
        w = w / w.norm(dim=1, keepdim=True)
    if options.get("feature_norm"):
        h, w = h / h.norm(dim=1, keepdim=True), w / w.norm(dim=1, keepdim=True)
    if head.bias is not None:
        return scale * h @ w.T + head.bias
    return scale * h @ w.T


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", ["test_resnet", "dla46_c"])
def test_options_against_their_definition(name: str, options: dict[str, object]) -> None:
    net = fix_classifier(model(name), **options).eval()
    x = torch.randn(3, 3, 64, 64)
    torch.testing.assert_close(net(x).double(), reference(net, x, options), atol=2e-4, rtol=2e-4)
    head = net.get_classifier()
    trained = {n for n, _ in head.named_parameters() if not n.startswith("projector")}
    expected = {"weight"} if options.get("frame") == "learned" else set()
    if options.get("frame") == "learned" and not options.get("feature_norm"):
        expected |= {"bias"}
    assert trained == expected | ({"logit_scale"} if options.get("learn_scale") else set())
    net.train()(x).logsumexp(1).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("name", ["test_vit", "deit_tiny_distilled_patch16_224"])
@pytest.mark.parametrize("options", [OPTIONS[1], OPTIONS[4]], ids=str)
def test_options_on_transformers(name: str, options: dict[str, object]) -> None:
    net = fix_classifier(model(name), **options).train()
    out = net(torch.randn(2, 3, *net.pretrained_cfg["input_size"][1:]))
    sum(o.sum() for o in (out if isinstance(out, tuple) else (out,))).backward()
    assert all(head.projector is None or head.logit_scale.grad is not None for _, head in fixed_classifiers(net))


def test_learned_without_options_is_the_plain_model() -> None:
    net = model()
    plain = net.fc
    assert fix_classifier(net, "learned").fc is plain
    fix_classifier(fix_classifier(net), "learned")  # from a fixed one: trained from the frame on
    assert {n for n, _ in net.fc.named_parameters()} == {"weight", "bias"}
    assert frames.is_simplex(net.fc.weight)


@pytest.mark.parametrize("factor", [1.0, 1.7])
def test_learned_from_a_scaled_frame_takes_the_scale_once(factor: float) -> None:
    net = fix_classifier(model(), seed=2, logit_scale=16.0, learn_scale=True)
    with torch.no_grad():
        net.fc.logit_scale.fill_(factor)
    fix_classifier(net, "learned", logit_scale=8.0)
    torch.testing.assert_close(net.fc.weight.double(), frames.simplex(10, 96, seed=2), atol=1e-6, rtol=0)
    torch.testing.assert_close(net.fc.plain_weight().double(), 8 * frames.simplex(10, 96, seed=2), atol=1e-5, rtol=0)


def test_a_projector_widens_the_features_so_that_a_simplex_fits() -> None:
    net = fix_classifier(timm.create_model("test_resnet", num_classes=1000), projector="linear")
    assert net.fc.frame == "simplex"
    assert net.fc.weight.shape == (1000, 999)
    assert net.fc.in_features == 96
    wide = fix_classifier(model(), projector="linear")
    assert wide.fc.weight.shape == (10, 96)
    # The features that the model gives are the backbone's.
    x = torch.randn(2, 3, 64, 64)
    assert wide.forward_head(wide.forward_features(x), pre_logits=True).shape == (2, 96)


def test_nearest_simplex_as_a_frame() -> None:
    means = torch.randn(10, 96)
    net = fix_classifier(model(), frames.nearest_simplex(means), logit_scale=2.0)
    torch.testing.assert_close(net.fc.weight.double(), 2 * frames.nearest_simplex(means), atol=1e-6, rtol=0)
    assert (net.fc.frame, net.fc.seed) == ("simplex", None)


def test_freeing_folds_the_learned_scale_and_refuses_a_projector() -> None:
    net = fix_classifier(model(), learn_scale=True, logit_scale=3.0).eval()
    with torch.no_grad():
        net.fc.logit_scale.fill_(1.7)
    assert net.fc.scale == pytest.approx(5.1, abs=1e-4)
    x = torch.randn(2, 3, 64, 64)
    expected = net(x)
    assert torch.equal(free_classifier(net)(x), expected)
    projected = fix_classifier(model(), projector="mlp")
    with pytest.raises(UsageError, match=r"reset_classifier\(num_classes\)"):
        free_classifier(projected)
    assert isinstance(projected.fc, FixedClassifier)
    assert isinstance(fix_classifier(projected).fc, FixedClassifier)  # fixing again leaves the projector out
    assert projected.fc.projector is None
    assert projected.fc.weight.shape == (10, 96)


def test_a_frame_with_another_scale_loads_with_it() -> None:
    net, scaled = fix_classifier(model()), fix_classifier(model(), logit_scale=8.0)
    net.load_state_dict(scaled.state_dict())
    assert net.fc.seed == 0
    assert net.fc.scale == pytest.approx(8, abs=1e-4)
    assert torch.equal(net.fc.weight, scaled.fc.weight)


def test_a_meta_model_costs_nothing_and_takes_weights() -> None:
    with torch.device("meta"):
        net = fix_classifier(timm.create_model("test_resnet", num_classes=21843))  # no code is computed
    assert net.fc.frame == "spherical_code"
    assert net.fc.weight.is_meta
    with torch.device("meta"):
        small = fix_classifier(timm.create_model("test_resnet", num_classes=10))
    with pytest.raises(RuntimeError, match=r"fc\.weight is no simplex frame"):
        small.load_state_dict(model().state_dict(), assign=True)
    small.load_state_dict(fix_classifier(model()).state_dict(), assign=True)
    assert frames.is_simplex(small.fc.weight)
    assert small.fc.seed == 0


@pytest.mark.parametrize("num_classes", [10, 150, 200])
def test_a_meta_model_takes_frames_alone(num_classes: int) -> None:
    def made(seed: int = 3, frame: str = "auto", **options: object) -> nn.Module:
        return fix_classifier(timm.create_model("test_resnet", num_classes=num_classes), frame, seed, **options)

    with torch.device("meta"):
        same, turned, fitted = made(), made(4), made()
    fitted.fc.seed = None  # there is nothing that it could be drawn from
    cosines = made(frame="learned", feature_norm=True)
    with torch.no_grad():
        cosines.fc.weight.copy_(nn.functional.normalize(cosines.fc.weight, dim=1))
    for learned in (timm.create_model("test_resnet", num_classes=num_classes), cosines):
        with pytest.raises(RuntimeError, match=rf"fc\.weight is no {same.fc.frame} frame"):
            same.load_state_dict(learned.state_dict(), assign=True)
    for taken in (same, turned, fitted):
        taken.load_state_dict(made().state_dict(), assign=True)
        assert torch.equal(taken.fc.weight, made().fc.weight)
    assert [net.fc.seed for net in (same, turned, fitted)] == [3, None, None]


def test_parameters_that_are_assigned_do_not_train() -> None:
    net = fix_classifier(model())
    net.load_state_dict(free_classifier(fix_classifier(model())).state_dict(keep_vars=True), assign=True)
    assert not list(net.fc.parameters())
    assert {name for name, _ in net.fc.named_buffers()} == {"weight", "bias"}


@pytest.mark.parametrize(("name", "num_classes"), [("test_resnet", 10), ("test_resnet", 150), ("dla46_c", 10)])
def test_a_meta_model_draws_its_frame_when_it_becomes_real(name: str, num_classes: int) -> None:
    options = {"seed": 5, "logit_scale": 12.7, "feature_norm": True, "learn_scale": True}
    real = fix_classifier(timm.create_model(name, num_classes=num_classes), **options).bfloat16().float()
    with torch.device("meta"):
        net = fix_classifier(timm.create_model(name, num_classes=num_classes), **options)
    assert net.get_classifier().scale == 12.7
    for other in (net.to_empty(device="cpu"), copy.deepcopy(net).to("meta").to_empty(device="cpu")):
        head, made = other.get_classifier(), fix_classifier(real, **options).get_classifier()
        assert torch.equal(head.weight, made.weight)
        assert not head.bias.any()
        assert (head.seed, head.scale) == (5, made.scale)
    learned = timm.create_model(name, num_classes=num_classes).state_dict()
    with pytest.raises(RuntimeError, match="so it cannot be this model's fixed classifier"):
        net.load_state_dict(learned)


def test_a_frame_without_a_seed_cannot_come_back_from_the_meta_device() -> None:
    net = fix_classifier(model(), frames.nearest_simplex(torch.randn(10, 96))).to("meta")
    with pytest.raises(UsageError, match=r"no seed to be drawn from again: load its weights .*assign=True"):
        net.to_empty(device="cpu")


def test_odd_weight_shapes_are_refused() -> None:
    with pytest.raises(UsageError, match=r"\[K, d\] or \[K, d, 1, 1\]"):
        FixedClassifier(torch.zeros(3, 4, 3, 3))
