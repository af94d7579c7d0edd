import hashlib
import json
import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import timm_etf
from tests import commands
from tests.conftest import write_images
from timm_etf import UsageError, fix_classifier, geometry, hub
from timm_etf.classifier import fixed_classifiers
from timm_etf.features.candidates import Candidate
from timm_etf.features.extract import load
from timm_etf.frames import ClassTree
from timm_etf.hub.card import own_results
from timm_etf.studies.geometry import Settings as Geometry
from timm_etf.studies.geometry import run as run_geometry
from timm_etf.studies.random_features import Settings as RandomFeatures
from timm_etf.studies.random_features import run as run_random_features
from timm_etf.studies.retrieval import Settings as Retrieval
from timm_etf.studies.retrieval import run as run_retrieval
from timm_etf.transfer import Target, features_of, open_splits
from timm_etf.transfer.run import Settings, run, summary


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exported models: two of a plain head, two of a fixed one, all of random weights, one of them damaged."""
    root = tmp_path_factory.mktemp("models")
    for number, name in enumerate(("plain0", "plain1", "fixed0", "fixed1", "damaged")):
        torch.manual_seed(number)
        net = timm.create_model("test_resnet", num_classes=10, pretrained_cfg_overlay={"input_size": (3, 32, 32)})
        if name.startswith("fixed"):
            fix_classifier(net)
        if name == "damaged":
            torch.nn.init.constant_(net.conv1[0].weight, float("nan"))
        hub.export(net, root / name)
    return root


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image folder that random features do not tell apart perfectly: faint bars in noise."""
    root = tmp_path_factory.mktemp("faint")
    rng = np.random.default_rng(0)
    for split, count in (("train", 24), ("validation", 8)):
        for k in range(5):
            (root / split / f"class{k}").mkdir(parents=True)
            for i in range(count - k % 2):
                pixels = rng.integers(0, 200, (32, 32, 3), dtype=np.uint8)
                pixels[:, 6 * k : 6 * k + 6] += 30
                Image.fromarray(pixels).save(root / split / f"class{k}" / f"{i}.png")
    return root


def settings(folder: Path, images: Path, out: Path, **changes: object) -> Settings:
    values = {
        "models": (f"plain=local-dir:{folder}/plain0", f"fixed=local-dir:{folder}/fixed0"),
        "targets": (f"{images},name=bars,test=validation",),
        "protocols": ("probe", "knn", "fewshot"),
        "seeds": 2,
        "workers": 0,
        "out": out,
    }
    return Settings(**values | changes)


def times(out: Path) -> dict[str, int]:
    return {
        str(p): p.stat().st_mtime_ns for folder in ("results", "features") for p in (out / folder).rglob("*.safet*")
    }


def test_a_comparison_from_nothing_and_again_from_what_is_there(models: Path, images: Path, tmp_path: Path) -> None:
    chosen = settings(models, images, tmp_path / "out", depths=2)
    report = run(chosen)
    assert report.protocols == [
        "probe at depth 1 of 5",
        "probe at depth 5 of 5",
        "probe",
        "knn",
        "1-shot",
        "5-shot",
        "10-shot",
    ]
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert "standardised" in written["protocols"]["probe"]["targets"]["bars"]["features"]
    row = written["protocols"]["1-shot"]["targets"]["bars"]
    assert row["test_images"] == 38
    plain, fixed = (row["models"][la] for la in ("plain", "fixed"))
    low, high = plain["interval_over_test_images"]
    assert low <= plain["accuracy"] <= high
    difference = row["differences"]["fixed"]
    assert difference["mean"] != 0
    assert difference["mean"] == pytest.approx(fixed["accuracy"] - plain["accuracy"])
    assert difference["by_run"] == pytest.approx(
        [b - a for a, b in zip(plain["runs"][0], fixed["runs"][0], strict=True)]
    )
    assert written["protocols"]["1-shot"]["mean"]["differences"]["fixed"]["mean"] == pytest.approx(difference["mean"])
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| bars | 38 |" in text
    assert "Features: spatial mean of layer 1 of 5; standardised" in text
    assert "Features: pre-logits, before any projector; unit length." in text
    for name in ("transfer.png", "collapse.png", "depths.png"):
        assert Image.open(tmp_path / "out" / name).size[0] > 500
    assert "fixed - plain" in summary(report, tmp_path / "out")

    before = times(tmp_path / "out")
    again = run(chosen)
    assert times(tmp_path / "out") == before
    assert again.as_json()["protocols"] == written["protocols"]
    # Another seed or protocol computes just that.
    run(settings(models, images, tmp_path / "out", seeds=3, depths=2, protocols=("knn", "probe")))
    new = {Path(p).name for p in times(tmp_path / "out").keys() - before.keys()}
    assert new == {f"{p}-seed2.safetensors" for p in ("knn", "probe", "probe-at-depth-1-of-5", "probe-at-depth-5-of-5")}


def test_where_classes_have_a_tree_it_says_who_is_near_whom(models: Path, images: Path, tmp_path: Path) -> None:
    tree = tmp_path / "tree.tsv"
    tree.write_text("class0\ta\nclass1\ta\nclass2\tb/c\nclass3\tb/c\nclass4\tb\n")
    target = f"{images},name=bars,test=validation,tree={tree}"
    chosen = settings(models, images, tmp_path / "out", targets=(target,), protocols=("probe", "knn", "fewshot"))
    found = run(chosen).as_json()["protocols"]
    plain = settings(models, images, tmp_path / "plain", features=tmp_path / "out" / "features")
    without = run(plain).as_json()["protocols"]
    distance = ClassTree.read(tree, [f"class{k}" for k in range(5)]).distance
    for label in ("plain", "fixed"):
        net = timm.create_model(f"local-dir:{models / label}0", pretrained=True)
        test = features_of(net, open_splits(Target("bars", str(images), test="validation")).test, workers=0)
        near = geometry.of_neighbours(torch.from_numpy(test.x), torch.from_numpy(test.y), distance)
        order = {p: found[p]["targets"]["bars"].get("order", {}).get(label) for p in found}
        assert order["knn"] == {k: pytest.approx([v, v], rel=1e-4) for k, v in near.items()}
        assert order["5-shot"] is None
        (runs,) = found["probe"]["targets"]["bars"]["models"][label]["runs"]
        assert {p: without[p]["targets"]["bars"]["models"][label]["runs"] for p in without} == {
            p: found[p]["targets"]["bars"]["models"][label]["runs"] for p in found
        }
        probe = order["probe"]
        assert len(probe) == 7  # there are no 20 classes
        for accuracy, severity, hd1, hd5 in zip(runs, probe["severity"], probe["hd1"], probe["hd5"], strict=True):
            assert hd1 == pytest.approx(severity * (1 - accuracy / 100))
            assert hd5 == pytest.approx(
                distance[torch.from_numpy(test.y)].mean().item()
            )  # of all classes, in whatever order
            assert 1 <= severity <= 3
    report = (tmp_path / "out" / "report.md").read_text()
    assert report.count("| bars | mAHP@250, how near") == report.count("| bars | severity, mean distance") == 1
    assert "in its tree" not in (tmp_path / "plain" / "report.md").read_text()
    # What was filed under one tree is not another's.
    tree.write_text(tree.read_text().replace("b/c", "b"))
    again = run(chosen).as_json()["protocols"]["probe"]["targets"]["bars"]["order"]["plain"]
    assert again["hd5"] != found["probe"]["targets"]["bars"]["order"]["plain"]["hd5"]
    tree.write_text("class0\ta\n")
    with pytest.raises(UsageError, match="lacks 4 of 5 classes"):
        run(chosen)


def test_two_processes_share_the_jobs_and_report_once(models: Path, images: Path, tmp_path: Path) -> None:
    one = run(settings(models, images, tmp_path / "one", protocols=("knn", "fewshot")))
    asked = settings(models, images, tmp_path / "two")
    options = ["--models", *asked.models, "--targets", *asked.targets, "--protocols", "knn", "fewshot", "--seeds", "2"]
    env = {"OMP_NUM_THREADS": "1"}
    done = commands.run_ranks(2, "transfer", *options, "--out", asked.out, "--workers", 0, env=env)
    assert [rank.stdout.count("report: ") for rank in done] == [1, 0]
    two = json.loads((asked.out / "results.json").read_text())["protocols"]
    assert two == json.loads(json.dumps(one.as_json()["protocols"]))


def test_training_seeds_of_one_method_are_paired(models: Path, images: Path, tmp_path: Path) -> None:
    specs = tuple(f"{n}=local-dir:{models}/{n}{i}" for n in ("plain", "fixed") for i in range(2))
    report = run(settings(models, images, tmp_path, models=specs, protocols=("knn",)))
    assert report.labels == ["plain", "fixed"]
    assert report.repetitions.startswith("2 models of each label")
    target = report.targets[0]
    by_model = report.accuracies("plain", target, "knn")
    alone = run(settings(models, images, tmp_path, models=specs[1:2], protocols=("knn",)))
    assert by_model[1] == pytest.approx(sum(alone.accuracies("plain", target, "knn")) / 2)
    # Each model's own numbers stand there under the hash of its weights, which is how a card finds them.
    sha256 = hashlib.sha256((models / "plain1" / "model.safetensors").read_bytes()).hexdigest()
    assert alone.as_json()["weights_sha256"] == {"plain": [sha256]}
    for written in (report.as_json(), alone.as_json()):
        own = own_results(written, sha256)["protocols"]["knn"]["targets"]["bars"]  # type: ignore[index]
        assert own["accuracy"] == pytest.approx(by_model[1])
    difference = report.difference("fixed", [target], "knn")
    fixed = report.accuracies("fixed", target, "knn")
    assert difference.by_run == pytest.approx([b - a for a, b in zip(by_model, fixed, strict=True)])
    low, high = difference.runs
    assert low <= difference.mean <= high


def test_what_fails_does_not_stop_the_rest_and_is_reported(models: Path, images: Path, tmp_path: Path) -> None:
    write_images(tmp_path / "strange", "train", 12)
    write_images(tmp_path / "strange", "test", 4)
    (tmp_path / "strange" / "train" / "class1").rename(tmp_path / "strange" / "train" / "other")
    write_images(tmp_path / "few", "train", 2)
    write_images(tmp_path / "few", "test", 4)
    (tmp_path / "few" / "train" / "class0" / "1.png").write_bytes(b"\x89PNG cut")
    report = run(
        settings(
            models,
            images,
            tmp_path / "out",
            models=(
                f"plain=local-dir:{models}/plain0",
                f"damaged=local-dir:{models}/damaged",
                "bad=test_resnet,pretrained=False,depth=3",
            ),
            targets=(f"{images},name=bars,test=validation", str(tmp_path / "strange"), str(tmp_path / "few"), "kanji"),
            protocols=("knn", "fewshot"),
            data_root=tmp_path / "none",
        )
    )
    missing = report.missing
    assert "not built in" in missing["kanji"]
    assert "name their classes differently" in missing["strange"]
    assert "are not finite" in missing["damaged: bars"]
    assert "Cannot create test_resnet" in missing["bad"]
    assert "classes have fewer than 10 training images" in missing["plain: few, 10-shot"]
    assert "plain: few, knn" not in missing
    text = (tmp_path / "out" / "report.md").read_text()
    assert "1 images could not be read and were left out" in text
    assert "| bars | 38 |" in text
    assert all(reason in text for reason in missing.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": ("resnet5000",)}, "timm knows no model 'resnet5000'"),
        ({"models": ("local-dir:/nowhere",)}, "no config.json in that folder"),
        ({"models": ("a/b=resnet18",)}, "'a/b=resnet18' is no folder on this machine"),
        ({"models": ("resnet18", "resnet18,drop_rate=0.1")}, "Two models are called 'resnet18'"),
        ({"models": ("resnet18,drop_rate",)}, "'drop_rate' in .* is no argument"),
        ({"models": ("x|y=resnet18",)}, r"'x\|y' cannot be a label"),
        ({"models": ("<b>*z*=resnet18",)}, "cannot be a label"),
        ({"models": ("tests",)}, "tests: no config.json in that folder"),
        ({"protocols": ("knn",), "depths": 2}, "add probe to --protocols"),
        ({"seeds": 0}, "--seeds is at least 1"),
        ({"targets": ("nothing",)}, "No target 'nothing'"),
    ],
)
def test_wrong_settings_cost_nothing(
    models: Path, images: Path, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        run(settings(models, images, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_nothing_at_all(models: Path, images: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Nothing could be computed: kanji: not built"):
        run(settings(models, images, tmp_path / "out", targets=("kanji",), data_root=tmp_path))


def test_fine_tuning_learns_the_target(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for rates in ("FIRST_RATES", "LEARNING_RATES"):  # three trainings instead of four or more
        monkeypatch.setattr(f"timm_etf.transfer.fine_tuning.{rates}", (0.003, 0.03))
    write_images(tmp_path / "bars", "train", 24)
    write_images(tmp_path / "bars", "validation", 7)
    chosen = settings(
        models,
        tmp_path / "bars",
        tmp_path,
        models=(f"fixed=local-dir:{models}/fixed0",),
        protocols=("finetune",),
        seeds=1,
        finetune_steps=60,
        finetune_batch_size=16,
    )
    report = run(chosen)
    target = report.targets[0]
    for label in report.labels:
        (accuracy,) = report.accuracies(label, target, "finetune")
        assert accuracy > 60  # by chance 20
    result = report.runs("fixed", "bars", "finetune")[0][0]
    assert set(result.chosen) == {"lr"}
    assert "60 steps of 16 images" in result.treatment
    assert not (tmp_path / "features").exists()
    before = times(tmp_path)
    run(chosen)
    assert times(tmp_path) == before


PLAIN = """
import sys, timm, torch
assert "timm_etf" not in sys.modules
folder, images, out = sys.argv[1:]
model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
images = timm.data.create_dataset("folder", images, transform=transform)
with torch.inference_mode():
    torch.save(torch.cat([model(image.unsqueeze(0)) for image, _ in images]), out)
"""


@pytest.mark.parametrize("head", ["learned", "etf", "nearest"])
def test_a_kept_model_is_the_one_that_was_scored(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, head: str
) -> None:
    for rates in ("FIRST_RATES", "LEARNING_RATES"):
        monkeypatch.setattr(f"timm_etf.transfer.fine_tuning.{rates}", (0.03,))
    for split in ("train", "validation", "test"):
        write_images(tmp_path / "bars", split, 7)
    options = {"models": (f"fixed=local-dir:{models}/fixed0",), "protocols": ("finetune",), "seeds": 1}
    options |= {"finetune_steps": 20, "finetune_batch_size": 16, "finetune_head": head, "keep_models": True}
    chosen = settings(models, tmp_path / "bars", tmp_path / "out", targets=(str(tmp_path / "bars"),), **options)
    report = run(chosen)
    result = report.runs("fixed", "bars", "finetune")[0][0]
    folder = tmp_path / "out" / "models" / "fixed" / "0" / "bars" / "seed0"
    commands.run(folder, tmp_path / "bars" / "test", tmp_path / "logits", code=PLAIN, fresh=True, check=True)
    logits = torch.load(tmp_path / "logits")
    assert timm.create_model(f"local-dir:{folder}").pretrained_cfg["label_names"] == [f"class{k}" for k in range(5)]
    assert (logits.argmax(1).numpy() == result.y).tolist() == result.correct.astype(bool).tolist()
    config = json.loads((folder / "config.json").read_text())
    assert ("etf" in config) == (head != "learned")
    assert json.loads((folder / "results.json").read_text())["finetuned"]["target"] == "bars"
    assert f"Fine-tuned on bars, from `local-dir:{models}/fixed0`" in (folder / "README.md").read_text()
    restored = timm_etf.create_model(f"local-dir:{folder}", pretrained=True)
    assert len(list(fixed_classifiers(restored))) == (head != "learned")
    before = times(tmp_path / "out")
    assert any("finetune" in path for path in before)
    written = folder.stat().st_mtime_ns
    run(chosen)
    assert (times(tmp_path / "out"), folder.stat().st_mtime_ns) == (before, written)
    shutil.rmtree(folder)  # and it comes back
    run(chosen)
    assert (folder / "model.safetensors").exists()
    if head == "etf":
        return
    inputs = {"models": (f"tuned={folder}",), "data": (str(tmp_path / "bars"),), "workers": 0}
    run_geometry(Geometry(out=tmp_path / "geometry", **inputs))
    run_retrieval(Retrieval(out=tmp_path / "retrieval", fitted=(), **inputs))
    sweep = {"a2": (0.0,), "num_features": (16,), "gammas": (0.1,), "draws": 2}
    run_random_features(RandomFeatures(out=tmp_path / "random", **sweep, **inputs))
    for verb in ("geometry", "retrieval", "random"):
        assert not json.loads((tmp_path / verb / "results.json").read_text())["missing"]


@pytest.mark.slow
def test_differences_are_shown_over_the_distance_from_the_source(models: Path, images: Path, tmp_path: Path) -> None:
    for name, level in (("near", 0), ("middle", 60), ("far", 120)):
        shutil.copytree(images, tmp_path / name)
        for path in (tmp_path / name).rglob("*.png"):
            pixels = np.asarray(Image.open(path)).astype(int) + level
            Image.fromarray(np.minimum(255, pixels).astype(np.uint8)).save(path)
    groups = {"near": "near", "middle": "near", "far": "far"}
    targets = tuple(f"{tmp_path / name},group={group}" for name, group in groups.items())
    both = tuple(f"{label}={models}/{label}{number}" for label in ("plain", "fixed") for number in (0, 1))
    options = {"models": both, "targets": targets, "protocols": ("knn",), "source": str(images)}
    report = run(settings(models, images, tmp_path / "out", neutral="test_resnet,pretrained=False", **options))
    assert not report.missing
    told = json.loads((tmp_path / "out" / "results.json").read_text())["distance"]
    assert set(told["by_model"]) == {"plain", "fixed", "neutral"}
    for found in told["by_model"].values():
        assert found["near"]["proxy_a"] < 0.5 < 1.5 < found["far"]["proxy_a"]
        assert found["near"]["frechet"] < found["middle"]["frechet"] < found["far"]["frechet"]
    assert -1 <= told["difference_over_distance"]["knn"]["fixed"]["spearman"] <= 1
    page = (tmp_path / "out" / "report.md").read_text()
    assert "| **mean of 2 near** |" in page
    assert "| **mean of 1 far** |" in page
    page = page[page.index("## Distance from") :]
    assert page.index("| near | 0.") < page.index("| middle | ") < page.index("| far | ")
    assert "`fixed` - `plain` under knn over proxy A-distance: rank correlation" in page
    assert (tmp_path / "out" / "distance.png").stat().st_size > 10_000


def test_a_source_that_is_not_there(models: Path, images: Path, tmp_path: Path) -> None:
    for options, says in (
        ({"source": "kanji"}, "--source kanji: not built in"),
        ({"source": str(images), "neutral": "no_such_model"}, "knows no model"),
        ({"neutral": "test_resnet"}, "give it with --source"),
    ):
        with pytest.raises(UsageError, match=says):
            run(settings(models, images, tmp_path / "out", data_root=tmp_path, **options))
    assert not (tmp_path / "out").exists()


def test_keeping_models_needs_fine_tuning(models: Path, images: Path, tmp_path: Path) -> None:
    for options in ({"keep_models": True}, {"finetune_head": "etf"}):
        with pytest.raises(UsageError, match="add finetune to --protocols"):
            run(settings(models, images, tmp_path / "out", **options))


def test_a_killed_run_continues_where_it_was(models: Path, images: Path, tmp_path: Path) -> None:
    asked = settings(models, images, tmp_path / "out", seeds=8)
    command = ["transfer", "--models", *asked.models, "--targets", *asked.targets, "--workers", "0", "--seeds", "8"]
    command += ["--out", asked.out]
    killed = commands.Command(*command)
    deadline = time.monotonic() + 100
    while len(list(asked.out.rglob("*-seed*.safetensors"))) < 5:
        assert time.monotonic() < deadline
        assert killed.poll() is None
        time.sleep(0.02)
    killed.kill()
    before = times(asked.out)
    assert 5 <= sum("seed" in p for p in before) < 2 * 5 * 8
    assert not (asked.out / "report.md").exists()
    done = commands.run(*command, check=True)
    after = times(asked.out)
    assert sum("seed" in p for p in after) == 2 * 5 * 8
    assert {p: t for p, t in after.items() if p in before} == before
    assert f"report:  {asked.out / 'report.md'}" in done.stdout


def test_arguments_of_a_model_are_part_of_what_its_numbers_are_filed_under(images: Path, tmp_path: Path) -> None:
    net = "test_resnet,pretrained=False"
    specs = (f"avg={net}", f"max={net},global_pool=max", f"stride={net},output_stride=8", f"again={net}")
    run(settings(tmp_path, images, tmp_path / "out", models=specs, protocols=("knn",)))
    # Same weights, names and shapes; the fourth is the first again.
    assert len(list((tmp_path / "out" / "features").glob("*/features.json"))) == 3 * 2
    means = [load(p.parent).x.mean() for p in sorted((tmp_path / "out" / "features").glob("*/features.json"))]
    assert len({round(float(m), 6) for m in means}) == 3 * 2


def test_fine_tuning_is_filed_under_the_models_arguments_but_not_the_number_of_workers(
    models: Path, images: Path, tmp_path: Path
) -> None:
    options = {"protocols": ("finetune",), "seeds": 1, "finetune_steps": 1, "finetune_batch_size": 8}

    def files(model: str, **more: object) -> dict[str, int]:
        run(settings(models, images, tmp_path / "out", models=(model,), **options, **more))
        return times(tmp_path / "out")

    first = files("a=test_resnet,pretrained=False")
    assert files("a=test_resnet,pretrained=False", workers=1) == first
    assert files("a=test_resnet,pretrained=False,drop_rate=0.9") != first


def test_each_file_of_weights_and_features_is_read_once(
    models: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: Counter[str] = Counter()

    def counted(name: str, function: Callable[..., object]) -> Callable[..., object]:
        return lambda *args, **kwargs: (counts.update([name]), function(*args, **kwargs))[1]

    import timm_etf.transfer.run as module
    from timm_etf.features import extract as extraction

    monkeypatch.setattr("hashlib.file_digest", counted("file hashed", hashlib.file_digest))
    monkeypatch.setattr(extraction, "weights_hash", counted("tensors hashed", extraction.weights_hash))
    monkeypatch.setattr(module, "load", counted("features loaded", load))
    monkeypatch.setattr(Candidate, "create", counted("model made", Candidate.create))
    protocols = ("probe", "knn", "fewshot", "finetune")
    chosen = settings(models, images, tmp_path / "out", protocols=protocols, finetune_steps=1, finetune_batch_size=8)
    run(chosen)
    # Two models, one target of two splits, six jobs on features with two seeds each, two fine-tunings of seven runs.
    assert counts == {"file hashed": 2, "model made": 2, "features loaded": 2 * 2}


def test_the_same_weights_do_not_count_twice(models: Path, images: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="given twice"):
        run(settings(models, images, tmp_path / "out", models=(f"a={models}/plain0", f"a=local-dir:{models}/plain0")))
    shutil.copytree(models / "plain0", tmp_path / "copy")
    specs = (f"a={models}/plain0", f"a={tmp_path}/copy")
    report = run(settings(models, images, tmp_path / "out", models=specs, protocols=("knn",)))
    (reason,) = report.missing.values()
    assert "one training counts once" in reason


def test_a_chunk_of_one_damaged_image_is_left_out(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from timm_etf.features import extract as extraction

    monkeypatch.setattr(extraction, "CHUNK", 11)
    write_images(tmp_path / "odd", "train", 6)  # 32 images
    write_images(tmp_path / "odd", "test", 2)  # 12 images: the last is a chunk by itself
    (last,) = sorted((tmp_path / "odd" / "test").rglob("*.png"))[-1:]
    last.write_bytes(b"\x89PNG cut")
    report = run(
        settings(
            tmp_path, images, tmp_path / "out", models=("a=test_resnet,pretrained=False",), targets=(f"{tmp_path}/odd",)
        )
    )
    assert len(report.runs("a", "odd", "probe")[0][0].y) == 11
    assert any("1 images could not be read" in note for note in report.notes)


def test_a_protocol_that_crashes_is_named_and_the_others_go_on(
    models: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import timm_etf.transfer.run as module

    def crash(*args: object, **kwargs: object) -> None:
        raise RuntimeError("a bug somewhere\nand more lines")

    monkeypatch.setattr(module, "knn", crash)
    report = run(settings(models, images, tmp_path / "out", protocols=("knn", "probe")))
    assert report.protocols == ["probe"]
    assert report.missing["plain: bars, knn"] == "RuntimeError: a bug somewhere"
    monkeypatch.undo()
    assert run(settings(models, images, tmp_path / "out", protocols=("knn", "probe"))).missing == {}


def test_a_full_disk_is_no_failure_of_one_part(models: Path, images: Path, tmp_path: Path) -> None:
    asked = settings(models, images, tmp_path / "out")
    command = ["transfer", "--models", *asked.models, "--targets", *asked.targets, "--workers", "0", "--out", asked.out]
    done = commands.run(*command, largest_file=20_000)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: Cannot write (")
    assert not (asked.out / "report.md").exists()


def test_a_held_out_validation_split_is_what_is_scored_where_there_is_no_test_split(
    models: Path, images: Path, tmp_path: Path
) -> None:
    report = run(settings(models, images, tmp_path / "out", targets=(str(images),), protocols=("knn",)))
    assert len(report.runs("plain", images.name, "knn")[0][0].y) == 38
    assert any("scored on its validation split" in note for note in report.notes)
