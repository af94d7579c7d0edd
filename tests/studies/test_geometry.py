import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from tests import commands
from tests.geometry.test_neural_collapse import by_definition
from timm_etf import UsageError, fix_classifier
from timm_etf.features.study import sample
from timm_etf.frames import ClassTree
from timm_etf.geometry import of_neighbours, of_rankings
from timm_etf.studies.geometry import Settings, as_markdown, classifier, run, summary
from timm_etf.transfer import Target, features_of, open_splits


def inputs(
    exported: Path, images: Path, out: Path, names: tuple[str, ...] = ("plain", "fixed"), **changes: object
) -> Settings:
    models = tuple(f"{n}=local-dir:{exported}/{n}" for n in names)
    return Settings(
        **{"models": models, "data": (f"{images},name=bars,test=validation",), "out": out, "workers": 0} | changes
    )


@pytest.fixture(scope="module")
def measured(exported: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("geometry")
    return out, run(inputs(exported, images, out))


def test_the_report_has_what_the_features_say(measured: tuple[Path, dict], exported: Path, images: Path) -> None:
    out, results = measured
    assert json.loads((out / "results.json").read_text()) == {"schema": 1} | json.loads(json.dumps(results))
    splits = open_splits(Target("bars", str(images), test="validation"))
    for label in ("plain", "fixed"):
        net = timm.create_model(f"local-dir:{exported / label}", pretrained=True).eval()
        weight = net.fc.weight.detach().double().numpy()
        train, test = (features_of(net, s, workers=0) for s in (splits.train, splits.test))
        means = np.array([train.x[train.y == k].mean(0) for k in range(5)])
        for split, found in (("train", train), ("test", test)):
            (got,) = results["geometry"]["bars"][split][label]
            expected = by_definition(found.x.astype(np.float64), found.y, weight)
            assert {k: got[k] for k in expected} == pytest.approx(expected, rel=1e-3, abs=1e-6)
            logits = found.x @ weight.T + net.fc.bias.detach().numpy()
            nearest = np.square(found.x[:, None] - means).sum(2).argmin(1)
            assert got["nc4"] == pytest.approx((nearest == logits.argmax(1)).mean())
            assert got["top1"] == pytest.approx((found.y == logits.argmax(1)).mean())
            assert got["nearest_mean"] == pytest.approx((found.y == nearest).mean())
            total = np.square(found.x - found.x.mean(0)).sum(1).mean()
            assert got["within_share"] == pytest.approx(expected["within"] * found.x.shape[1] / total, rel=1e-4)
    report = (out / "report.md").read_text()
    assert report.startswith(as_markdown(results))
    assert "![Class covariance and its spectrum](covariance-bars.png)" in report
    assert (out / "covariance-bars.png").read_bytes().startswith(b"\x89PNG")
    assert "bars, fixed: nc1 " in summary(results, out)


def test_where_classes_have_a_tree_it_says_who_is_near_whom(exported: Path, images: Path, tmp_path: Path) -> None:
    tree = tmp_path / "tree.json"
    tree.write_text(json.dumps({f"class{k}": "a" if k < 2 else "b/c" for k in range(5)}))
    results = run(inputs(exported, images, tmp_path / "out", data=(f"{images},name=bars,tree={tree}",)))
    distance = ClassTree.read(tree, [f"class{k}" for k in range(5)]).distance
    splits = open_splits(Target("bars", str(images)))
    net = timm.create_model(f"local-dir:{exported / 'fixed'}", pretrained=True).eval()
    for split in ("train", "test"):
        found = features_of(net, getattr(splits, split), workers=0)
        x, y = torch.from_numpy(found.x), torch.from_numpy(found.y)
        with torch.no_grad():
            expected = of_neighbours(x, y, distance) | of_rankings(net.fc(x), y, distance)
        (got,) = results["geometry"]["bars"][split]["fixed"]
        expected = {k: v for k, v in expected.items() if not np.isnan(v)}
        assert {k: got[k] for k in expected} == pytest.approx(expected, rel=1e-4)
    assert "| mahp | " in as_markdown(results)


def test_what_cannot_be_measured_is_named_and_the_rest_goes_on(exported: Path, images: Path, tmp_path: Path) -> None:
    names = ("plain", "others", "damaged")
    results = run(
        inputs(exported, images, tmp_path / "out", names, data=(f"{images},name=bars,test=validation", "kanji"))
    )
    assert set(results["missing"]) == {"kanji", "damaged: bars"}
    assert "not finite" in results["missing"]["damaged: bars"]
    found = results["geometry"]["bars"]["test"]
    assert set(found) == {"plain", "others"}
    assert "nc3" in found["plain"][0]
    assert not {"nc3", "nc4", "top1"} & set(found["others"][0])  # its classes are in another order
    assert "missing: 2" in summary(results, tmp_path / "out")
    with pytest.raises(UsageError, match="timm knows no model 'resnet5'"):
        run(Settings(models=("resnet5",), data=(str(images),), out=tmp_path / "none"))
    with pytest.raises(UsageError, match="Nothing could be computed: damaged: bars"):
        run(inputs(exported, images, tmp_path / "bad", ("damaged",)))
    with pytest.raises(UsageError, match="at least one model"):
        run(Settings(models=(), data=(str(images),), out=tmp_path / "none"))
    assert not (tmp_path / "none").exists()


def test_again_and_with_two_processes_it_is_the_same(
    measured: tuple[Path, dict], exported: Path, images: Path, tmp_path: Path
) -> None:
    out, results = measured
    before = {p: p.stat().st_mtime_ns for p in (out / "features").rglob("*")}
    assert (
        run(inputs(exported, images, tmp_path / "again", features=out / "features"))["geometry"] == results["geometry"]
    )
    assert {p: p.stat().st_mtime_ns for p in (out / "features").rglob("*")} == before  # read, not computed
    asked = inputs(exported, images, tmp_path / "two")
    options = ["--models", *asked.models, "--data", *asked.data, "--out", asked.out, "--workers", "0"]
    printed = [done.stdout for done in commands.run_ranks(2, "geometry", *options)]
    assert [text.count("report: ") for text in printed] == [1, 0]
    two = json.loads((tmp_path / "two" / "results.json").read_text())["geometry"]
    for split in ("train", "test"):
        for label in ("plain", "fixed"):
            one = results["geometry"]["bars"][split][label][0]
            assert two["bars"][split][label][0] == pytest.approx(one, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    "name", ["test_resnet", "test_vit", "test_efficientnet", "test_convnext", "mobilenetv3_small_050"]
)
def test_the_classifier_found_is_what_follows_the_features(name: str) -> None:
    torch.manual_seed(0)
    classes = [str(k) for k in range(7)]
    for net in (timm.create_model(name, num_classes=7), fix_classifier(timm.create_model(name, num_classes=7))):
        net.eval()
        head = classifier(net, classes)
        x = net.forward_head(net.forward_features(image := torch.rand(2, 3, 160, 160)), pre_logits=True)
        assert torch.allclose(head(x).flatten(1), net(image), atol=1e-5)
    assert classifier(net, classes[:-1]) is None
    assert classifier(timm.create_model(name, num_classes=0), classes) is None
    assert classifier(torch.nn.Linear(3, 7), classes) is None


def test_a_sample_is_spread_over_the_chunks(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    sizes, start = (5, 1, 9, 4), 0
    for size in sizes:
        values = np.arange(start, start + size)
        save_file(
            {"pre_logits": values[:, None].astype(np.float32), "label": values}, tmp_path / f"{start:09d}.safetensors"
        )
        start += size
    x, y = sample(tmp_path, sum(sizes), 7)
    assert y.tolist() == [0, 2, 5, 8, 10, 13, 16]
    assert x[:, 0].tolist() == y.tolist()
    assert len(sample(tmp_path, sum(sizes), 100)[1]) == 19
