import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch

from tests import commands
from tests.test_retrieval import by_ranking
from timm_etf import UsageError, embed, fix_classifier, hub
from timm_etf.features.extract import features_of
from timm_etf.report.statistics import t_interval
from timm_etf.studies.retrieval import Settings, as_markdown, compatibility, pairings, run, summary
from timm_etf.transfer import Target, open_splits

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "retrieval" / "weightings"))

import weightings

NAMES = [f"class{k}" for k in range(5)]


def export(
    folder: Path, name: str, weights: int, names: list[str] | None = NAMES, classes: int = 0, **fixed: Any
) -> str:
    torch.manual_seed(weights)
    overlay = {"input_size": (3, 32, 32)}
    net = timm.create_model(name, num_classes=classes or len(names or NAMES), pretrained_cfg_overlay=overlay)
    if fixed:
        fix_classifier(net, **fixed)
    hub.export(net, folder, label_names=names)
    return f"local-dir:{folder}"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    return {
        "plain": export(root / "plain", "test_resnet", 0),
        "old": export(root / "old", "test_resnet", 1, frame="simplex", seed=0),
        "again": export(root / "again", "test_resnet", 2, frame="simplex", seed=1, logit_scale=9.0),
        "wide": export(root / "wide", "test_efficientnet", 3, frame="simplex", seed=2, feature_norm=True),
        "reversed": export(root / "reversed", "test_resnet", 1, NAMES[::-1], frame="simplex", seed=0),
        "unnamed": export(root / "unnamed", "test_resnet", 1, None, frame="simplex", seed=0),
        "gaussian": export(root / "gaussian", "test_resnet", 1, frame="gaussian", seed=0),
        "gaussian-again": export(root / "gaussian-again", "test_resnet", 5, frame="gaussian", seed=0),
        "more": export(root / "more", "test_resnet", 4, ["a", *NAMES[::-1], "b"], frame="simplex", seed=1),
        "one": export(root / "one", "test_resnet", 1, [*NAMES[:1], *"abcd"]),
        "unnamed-more": export(root / "unnamed-more", "test_resnet", 1, None, classes=7),
    }


def inputs(models: dict[str, str], images: Path, out: Path, *specs: str, **changes: object) -> Settings:
    texts = tuple(f"{s.partition('=')[0]}={models[s.rpartition('=')[2]]}" for s in specs)
    data = (f"{images},name=bars,test=validation",)
    return Settings(**{"models": texts, "data": data, "out": out, "workers": 0, "fitted": (10, 100, 1000)} | changes)


@pytest.fixture(scope="module")
def measured(
    models: dict[str, str], images: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("retrieval")
    return out, run(inputs(models, images, out, "plain", "etf=old", "etf=again", "wide"))


def row(results: dict[str, Any], queries: str, gallery: str, *, within: bool = False) -> dict[str, Any]:
    return next(
        p
        for p in results["retrieval"]["bars"]["pairs"]
        if (p["queries"], p["gallery"], "difference" not in p) == (queries, gallery, within)
    )


def test_the_report_has_what_vectors_of_embed_find(
    measured: tuple[Path, dict[str, Any]], models: dict[str, str], images: Path
) -> None:
    """In every space, from the images on, by a full ranking: nothing here goes through the cache or a block."""
    out, results = measured
    assert json.loads((out / "results.json").read_text()) == {"schema": 1} | json.loads(json.dumps(results))
    splits = open_splits(Target("bars", str(images), test="validation"))
    nets = {n: timm.create_model(models[n], pretrained=True).eval() for n in ("plain", "old", "again", "wide")}
    trainings = dict(zip((("plain", 0), ("etf", 0), ("etf", 1), ("wide", 0)), nets.values(), strict=True))
    pixels = {}
    for training, net in trainings.items():
        transform = timm.data.create_transform(**timm.data.resolve_data_config(model=net))
        for split, size in SIZES.items():
            read = getattr(splits, split).read
            pixels[training, split] = torch.stack([transform(read(i, "RGB")) for i in range(size)])
    labels = {s: torch.from_numpy(getattr(splits, s).labels) for s in SIZES}
    for (q, gallery), of, within in (
        (("plain", "wide"), [(("plain", 0), ("wide", 0))], False),
        (("plain", "plain"), [(("plain", 0), ("plain", 0))], True),
        (("etf", "etf"), [(("etf", 0), ("etf", 1)), (("etf", 1), ("etf", 0))], False),
        (("wide", "etf"), [(("wide", 0), ("etf", 0)), (("wide", 0), ("etf", 1))], False),
    ):
        found = row(results, q, gallery, within=within)
        assert ("features" in found["spaces"]) == ("wide" not in (q, gallery))
        for space in ("coordinates", "centred", "features"):
            for number, (query, old) in enumerate(of if space in found["spaces"] else ()):
                kind = "features" if space == "features" else "frame"
                mean = {}
                for t in (query, old) if space == "centred" else ():
                    rows = np.random.default_rng(0).permutation(122)[:100]
                    mean[t] = embed(trainings[t], pixels[t, "train"][rows]).vectors.mean(0)
                by, indexed = (
                    embed(trainings[t], pixels[t, s], kind, mean=mean.get(t)).vectors
                    for t, s in ((query, "test"), (old, "train"))
                )
                expected = by_ranking(indexed.double(), labels["train"], by.double(), labels["test"])
                for metric, values in found["spaces"][space].items():
                    assert values[number] == pytest.approx(expected[metric], abs=1e-3), (q, gallery, space, metric)
    report = (out / "report.md").read_text()
    assert report.startswith(as_markdown(results))
    assert "| wide in etf |" in report
    assert "![recall@1 of every pair](retrieval-bars.png)" in report
    assert (out / "retrieval-bars.png").read_bytes().startswith(b"\x89PNG")
    assert "bars, etf in another etf: recall@1 features " in summary(results, out)
    assert "bars: no Procrustes on 1000 images: its gallery has 122" in results["notes"]


SIZES = {"train": 122, "test": 37}


def test_procrustes_is_fitted_on_pairs_of_the_gallery(
    measured: tuple[Path, dict[str, Any]], models: dict[str, str], images: Path
) -> None:
    _, results = measured
    splits = open_splits(Target("bars", str(images), test="validation"))
    old, new = (
        [features_of(timm.create_model(models[n], pretrained=True), s, workers=0) for s in (splits.train, splits.test)]
        for n in ("plain", "wide")
    )
    rows = np.random.default_rng(0).permutation(122)[:100]
    unit = [f.x.astype(np.float64) / np.linalg.norm(f.x, axis=1, keepdims=True) for f in (*new, *old)]
    (train, test), gallery = (
        [x - of[rows].mean(0) for x in pair] for pair, of in ((unit[:2], unit[0]), (unit[2:3], unit[2]))
    )
    left, _, right = np.linalg.svd(train[rows].T @ gallery[0][rows], full_matrices=False)
    turned = torch.from_numpy(test @ left[:, :96] @ right[:96])
    expected = by_ranking(*map(torch.from_numpy, (gallery[0], old[0].y)), turned, torch.from_numpy(new[1].y))
    found = row(results, "wide", "plain")["spaces"]["Procrustes 100"]
    assert {m: v[0] for m, v in found.items()} == pytest.approx({m: expected[m] for m in found}, abs=3)
    assert not any(s.startswith("Proc") for s in row(results, "plain", "plain", within=True)["spaces"])


def test_weightings_begin_with_what_the_verb_measures(
    measured: tuple[Path, dict[str, Any]], models: dict[str, str], images: Path, tmp_path: Path
) -> None:
    out, expected = measured
    specs = (f"etf={models['old']}", f"etf={models['again']}", f"alone={models['plain']}")
    data, cache = (f"{images},name=bars,test=validation",), out / "features"
    found = weightings.run(weightings.Settings(models=specs, data=data, out=tmp_path, workers=0, features=cache))
    told = found["weightings"]["bars"]
    assert set(told) == {"etf"}  # one training has no other
    spaces = row(expected, "etf", "etf")["spaces"]
    assert told["etf"]["coordinates"] == pytest.approx(spaces["coordinates"]["recall@1"])
    assert told["etf"]["centred by 100"] == pytest.approx(spaces["centred"]["recall@1"])
    assert told["etf"]["float16"] == pytest.approx(spaces["coordinates"]["recall@1"], abs=3)
    z = torch.tensor([[3.0, -1.0, 0.0, 4.0]])
    assert weightings.ranks(z, z).tolist() == [[0.5, -1.5, -0.5, 1.5]]
    assert weightings.largest(2)(z, z)[0].nonzero().flatten().tolist() == [0, 3]
    assert torch.equal(weightings.power(2)(z, z).sign(), z.sign())
    some = torch.randn(5000, 4, generator=torch.Generator().manual_seed(0)) @ torch.diag(torch.tensor([1.0, 2, 3, 4]))
    before, after = (way(some, some).T.cov().diagonal() for way in (weightings.centred, weightings.whitened))
    assert after.max() / after.min() < before.max() / before.min() / 4
    assert "| coordinates |" in (tmp_path / "report.md").read_text()


def test_differences_gain_and_compatibility(measured: tuple[Path, dict[str, Any]]) -> None:
    _, results = measured
    found = row(results, "wide", "etf")
    new = found["spaces"]["coordinates"]["recall@1"]
    own, features = (
        row(results, "etf", "etf", within=True)["spaces"][s]["recall@1"] for s in ("coordinates", "features")
    )
    assert found["trainings"] == [[3, 1], [3, 2]]
    assert found["difference"]["coordinates"] == pytest.approx(np.subtract(new, own))
    turned = found["spaces"]["Procrustes 10"]["recall@1"]
    assert found["difference"]["Procrustes 10"] == pytest.approx(np.subtract(turned, features))
    again = row(results, "wide", "wide", within=True)["spaces"]["features"]["recall@1"][0]
    if again - np.mean(own) >= 1:
        gain = found["update_gain"]["coordinates"]
        assert gain == pytest.approx((np.mean(new) - np.mean(own)) / (again - np.mean(own)))
    else:
        assert found["update_gain"]["coordinates"] is None
    low, high = t_interval(new)  # type: ignore[misc]
    assert f"| wide in etf | - | {np.mean(new):.1f} ({low:.1f} to {high:.1f}) |" in as_markdown(results)
    shares = results["retrieval"]["bars"]["compatibility"]
    assert (shares["coordinates"]["updates"], shares["features"]["updates"]) == (3, 1)  # the wide one has no features
    pairs = [{"queries": a, "gallery": b} | extra for a, b, extra in CHAIN]
    assert compatibility(pairs) == {"s": {"updates": 3, "average": 1 / 3, "ties": 1 / 3}}


CHAIN: list[tuple[str, str, dict[str, Any]]] = [
    *((label, label, {}) for label in "abc"),
    ("b", "a", {"difference": {"s": [1.0, 3.0]}}),
    ("c", "a", {"difference": {"s": [1.0, -1.0]}}),
    ("c", "b", {"difference": {"s": [-2.0, 1.0]}}),
    ("a", "b", {"difference": {"s": [5.0]}}),  # back to the old one: no update
    ("a", "a", {"difference": {"s": [5.0]}}),
]


def test_trainings_are_paired_in_their_order_or_all_with_all() -> None:
    assert list(pairings(["a", "b", "a", "b", "c"])) == [
        ("a", "a", [(0, 0), (2, 2)]),
        ("a", "a", [(0, 2), (2, 0)]),
        ("a", "b", [(0, 1), (2, 3)]),
        ("a", "c", [(0, 4), (2, 4)]),
        ("b", "b", [(1, 1), (3, 3)]),
        ("b", "a", [(1, 0), (3, 2)]),
        ("b", "b", [(1, 3), (3, 1)]),
        ("b", "c", [(1, 4), (3, 4)]),
        ("c", "c", [(4, 4)]),
        ("c", "a", [(4, 0), (4, 2)]),
        ("c", "b", [(4, 1), (4, 3)]),
    ]


def test_classes_are_matched_by_name(
    measured: tuple[Path, dict[str, Any]], models: dict[str, str], images: Path, tmp_path: Path
) -> None:
    cache = {"features": measured[0] / "features", "fitted": ()}
    found = run(inputs(models, images, tmp_path / "out", "old", "reversed", "unnamed", **cache))
    within = row(found, "old", "old", within=True)["spaces"]["coordinates"]
    # One backbone whose rows have other names: under the same names its coordinates are others than under its own.
    assert row(found, "unnamed", "old")["spaces"]["coordinates"] == within
    assert row(found, "reversed", "old")["spaces"]["coordinates"] != within
    assert row(found, "reversed", "reversed", within=True)["spaces"]["coordinates"]["mAP"] == pytest.approx(
        within["mAP"], abs=0.1
    )
    assert "reversed: its classes are in another order than the first model's; re-ordered by name" in found["notes"]
    assert any(n.startswith("unnamed: one of it and old names no classes") for n in found["notes"])
    by_name = row(found, "reversed", "old")["spaces"]["coordinates"]
    found = run(inputs(models, images, tmp_path / "first", "unnamed", "old", "reversed", **cache))
    assert row(found, "reversed", "old")["spaces"]["coordinates"] == by_name  # whatever the first one lacks
    assert row(found, "unnamed", "old")["spaces"]["coordinates"] == within
    found = run(inputs(models, images, tmp_path / "kinds", "old", "gaussian", **cache))
    assert any("frames of different kinds" in note for note in found["notes"])


def test_centred_logits_stand_beside_the_coordinates_of_other_frames(
    measured: tuple[Path, dict[str, Any]], models: dict[str, str], images: Path, tmp_path: Path
) -> None:
    cache = {"features": measured[0] / "features", "fitted": ()}
    results = run(
        inputs(models, images, tmp_path, "plain", "old=gaussian", "new=gaussian-again", free="plain", **cache)
    )
    assert "logits" not in row(results, "new", "plain")["spaces"]  # there the coordinates are
    assert "| features | coordinates | centred | logits |" in as_markdown(results)
    splits = open_splits(Target("bars", str(images), test="validation"))
    found, y = {}, {}
    for label, name, split in (("old", "gaussian", "train"), ("new", "gaussian-again", "test")):
        net = timm.create_model(models[name], pretrained=True).eval()
        features = features_of(net, getattr(splits, split), workers=0)
        z = torch.nn.functional.linear(torch.from_numpy(features.x), net.fc.weight).detach().double()
        found[label], y[label] = z - z.mean(1, keepdim=True), torch.from_numpy(features.y)
    expected = by_ranking(found["old"], y["old"], found["new"], y["new"])
    pair = row(results, "new", "old")
    assert {m: v[0] for m, v in pair["spaces"]["logits"].items()} == pytest.approx(
        {m: expected[m] for m in pair["spaces"]["logits"]}, abs=1e-3
    )
    free, old = (row(results, la, la, within=True)["spaces"] for la in ("plain", "old"))
    gained = free["features"]["recall@1"][0] - old["coordinates"]["recall@1"][0]
    gain = pair["update_gain"]["coordinates"]
    assert (gain is None) == (gained < 1)
    assert gain is None or gain == pytest.approx(pair["difference"]["coordinates"][0] / gained)
    assert "5 of its 5 classes are the models' own" in as_markdown(results)
    with pytest.raises(UsageError, match="--free new: it is one of the labels, old"):
        run(inputs(models, images, tmp_path / "no", "old", free="new"))


def test_models_of_different_classes_meet_in_those_they_share(
    measured: tuple[Path, dict[str, Any]], models: dict[str, str], images: Path, tmp_path: Path
) -> None:
    cache = {"features": measured[0] / "features", "fitted": ()}
    found = run(inputs(models, images, tmp_path / "out", "old", "new=more", **cache))
    assert any(n.startswith("new and old have 5 class names in common (of 7 and 5)") for n in found["notes"])
    splits = open_splits(Target("bars", str(images), test="validation"))
    places = {"old": list(range(5)), "new": [5, 4, 3, 2, 1]}  # of class0, class1, ... in the logits
    vectors: dict[tuple[str, str, str], torch.Tensor] = {}
    for label, name in (("old", "old"), ("new", "more")):
        net = timm.create_model(models[name], pretrained=True).eval()
        transform = timm.data.create_transform(**timm.data.resolve_data_config(model=net))
        for split in SIZES:
            read = getattr(splits, split).read
            with torch.no_grad():
                logits = net(torch.stack([transform(read(i, "RGB")) for i in range(SIZES[split])])).double()
            for space, z in (("all", logits), ("shared", logits[:, places[label]])):
                vectors[label, split, space] = z - z.mean(1, keepdim=True)
    labels = {s: torch.from_numpy(getattr(splits, s).labels) for s in SIZES}
    for query, gallery, space in (("new", "old", "shared"), ("old", "new", "shared"), ("new", "new", "all")):
        expected = by_ranking(
            vectors[gallery, "train", space], labels["train"], vectors[query, "test", space], labels["test"]
        )
        measured_here = row(found, query, gallery, within=query == gallery)["spaces"]["coordinates"]
        assert {m: v[0] for m, v in measured_here.items()} == pytest.approx(
            {m: expected[m] for m in measured_here}, abs=1e-3
        )


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ("one", "b and a have 1 class name in common (of 5 and 5), and coordinates are relative to two at least"),
        ("unnamed-more", "b and a have no class names in common (of 7 and 5), and coordinates are relative to two"),
    ],
)
def test_models_that_share_no_classes_are_refused(
    measured: tuple[Path, dict[str, Any]], models: dict[str, str], images: Path, tmp_path: Path, other: str, said: str
) -> None:
    done = commands.run(
        *("retrieval", "--models", f"a={models['old']}", f"b={models[other]}", "--data", f"{images},name=bars"),
        *("--out", tmp_path / "no", "--workers", "0", "--features", measured[0] / "features"),
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"error: {said}")
    assert not (tmp_path / "no" / "results.json").exists()


def test_processes_share_the_galleries(
    measured: tuple[Path, dict[str, Any]], models: dict[str, str], images: Path, tmp_path: Path
) -> None:
    texts = [f"plain={models['plain']}", f"etf={models['old']}", f"etf={models['again']}", f"wide={models['wide']}"]
    commands.run_ranks(
        2,
        *("retrieval", "--models", *texts, "--data", f"{images},name=bars,test=validation", "--out", tmp_path / "out"),
        *("--workers", "0", "--fitted", "10", "100", "1000", "--features", measured[0] / "features"),
    )
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["retrieval"] == json.loads(json.dumps(measured[1]["retrieval"]))


def test_what_cannot_be_searched_is_refused(models: dict[str, str], images: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    (empty / "test").mkdir(parents=True)
    (empty / "train").symlink_to(images / "train")
    with pytest.raises(UsageError, match=r"computed: empty: .*holds no images in class folders"):
        run(inputs(models, images, tmp_path / "out", "old", data=(str(empty),)))
    with pytest.raises(UsageError, match="--fitted takes numbers of images, at least 1"):
        run(inputs(models, images, tmp_path / "none", "old", fitted=(0,)))
    backbone = {"backbone": f"{models['old']},num_classes=0"}
    with pytest.raises(UsageError, match="no classifier, and so no frame"):
        run(inputs(backbone, images, tmp_path / "headless", "backbone"))
    assert not (tmp_path / "none").exists()


def test_again_it_is_the_same_from_the_cache(
    measured: tuple[Path, dict[str, Any]], models: dict[str, str], images: Path, tmp_path: Path
) -> None:
    out, results = measured
    before = {p: p.stat().st_mtime_ns for p in (out / "features").rglob("*")}
    again = run(inputs(models, images, tmp_path, "plain", "etf=old", "etf=again", "wide", features=out / "features"))
    assert again["retrieval"] == results["retrieval"]
    assert {p: p.stat().st_mtime_ns for p in (out / "features").rglob("*")} == before
