"""examples/class_trees, examples/narrow_heads and examples/growing: their arms, their data and what they measure."""

import json
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import tyro
from torch import nn

from tests import commands
from tests.conftest import write_images
from timm_etf import hub
from timm_etf.frames import ClassTree
from timm_etf.pretrain.config import PretrainConfig
from timm_etf.studies.geometry import Settings as Geometry

EXAMPLES = Path(__file__).parents[1] / "examples"
for name in ("study", "class_trees", "narrow_heads", "growing"):
    sys.path.insert(0, str(EXAMPLES / name))

import class_trees  # noqa: E402
import growing  # noqa: E402
import mistakes  # noqa: E402
import narrow_heads  # noqa: E402


def parsed(command: list[str]) -> PretrainConfig:
    verb, *arguments = command
    assert verb == "pretrain"
    settings = tyro.cli(PretrainConfig, args=arguments)
    settings.check()
    return settings


@pytest.fixture(scope="module")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three scripts of five letters, and five names of icons."""
    root = tmp_path_factory.mktemp("data")
    for name, second in (*((script, "test") for script in class_trees.SCRIPTS), ("icons-400", "validation")):
        write_images(root / name, "train", 12)
        write_images(root / name, second, 4)
    return root


def options(**changes: Any) -> Namespace:
    given = {"arms": None, "limit": None, "seeds": 2, "epochs": 3, "pretrain": [], "emoji_json": None}
    return Namespace(**given | {"sources": ["glyphs"]} | changes)


def test_the_classes_of_a_tree_are_held_out_whole_and_every_arm_can_be_trained(data_root: Path, tmp_path: Path) -> None:
    study = class_trees.Trees(options(out=tmp_path, data_root=data_root), "glyphs")
    study.prepare()
    classes = {half: sorted(p.name for p in (study.data / half / "train").iterdir()) for half in ("seen", "held-out")}
    assert (len(classes["seen"]), len(classes["held-out"])) == (12, 3)
    assert not set(classes["seen"]) & set(classes["held-out"])
    assert classes["seen"] == sorted(p.name for p in (study.seen / "validation").iterdir())
    held_back = [p.relative_to(study.tuned_on / "validation") for p in (study.tuned_on / "validation").rglob("*.png")]
    assert len(held_back) == 12 * 12 // 4
    assert not any((study.tuned_on / "train" / path).exists() for path in held_back)
    assert all((study.seen / "train" / path).exists() for path in held_back)
    tree = ClassTree.read(study.seen / "tree.tsv", classes["seen"])
    assert {path.split("/")[0] for path in tree.paths} == set(class_trees.SCRIPTS)
    jobs = study.tuning() + study.training()
    assert len(jobs) == 5 * 3 + 5 * 2
    found = [parsed(job.command) for job in jobs]
    assert {(s.hierarchy is not None, s.loss) for s in found} == {
        (False, "cross_entropy"),
        (True, "cross_entropy"),
        (True, "gram"),
    }
    assert study.after(jobs[0]) == []
    (measuring,) = study.after(jobs[-1])
    tyro.cli(Geometry, args=measuring.command[1:]).check()
    assert "5 arms: 15 trainings to tune, 10 to compare" in class_trees.plan([study], 100)


def test_emoji_have_unicodes_groups_and_people_of_one_picture_stay_together(tmp_path: Path) -> None:
    table = [{"unified": "2764-FE0F", "category": "Smileys & Emotion", "subcategory": "heart"}]
    (tmp_path / "emoji.json").write_text(json.dumps(table))
    assert class_trees.emoji_groups(tmp_path / "emoji.json") == {"2764": "Smileys_&_Emotion/heart"}
    woman, man = "1f469-200d-1f680", "1f468-200d-1f680"
    assert class_trees.motif(woman) == class_trees.motif(man) != class_trees.motif("1f680-1f680")


def test_coarse_heads_add_the_cross_entropy_of_each_level(tmp_path: Path) -> None:
    names = ("a", "b", "c", "d")
    write_images(tmp_path, "train", 1)
    for i, name in enumerate(names):
        (tmp_path / "train" / f"class{i}").rename(tmp_path / "train" / name)
    (tmp_path / "train" / "class4").rename(tmp_path / "train" / "e")
    (tmp_path / "tree.tsv").write_text("a\tx/y\nb\tx/y\nc\tx/z\nd\tx/z\ne\tw/v\n")
    model = timm.create_model("test_resnet", num_classes=5).eval()
    settings = PretrainConfig(
        model="test_resnet", data_dir=tmp_path, out=tmp_path / class_trees.COARSE / "run", smoothing=0.0
    )
    objective = class_trees.CoarseObjective(settings, model)
    images, targets = torch.randn(5, 3, 32, 32), torch.arange(5)
    features = model.forward_head(model.forward_features(images), pre_logits=True)
    groups = (torch.tensor([0, 0, 0, 0, 1]), torch.tensor([0, 0, 1, 1, 2]))
    assert [len(head.weight) for head in model.coarse] == [2, 3]
    expected = nn.functional.cross_entropy(model(images), targets)
    for head, of in zip(model.coarse, groups, strict=True):
        expected = expected + nn.functional.cross_entropy(head(features), of)
    torch.testing.assert_close(objective(model, images, targets), expected)
    plain = timm.create_model("test_resnet", num_classes=5)
    class_trees.CoarseObjective(PretrainConfig(model="x", data_dir=tmp_path, out=tmp_path / "train" / "run"), plain)
    assert not hasattr(plain, "coarse")


def test_mistakes_are_those_of_the_learned_arm_with_the_same_seed(tmp_path: Path) -> None:
    def run(top1: float, hd5: float, mahp: float) -> dict[str, Any]:
        seen = {f"{decided}{m}": v for decided in ("", "crm_") for m, v in {"top1": top1, "hd5": hd5}.items()}
        return {"seen": seen | {"severity": 1.5}, "held-out": {"mahp": mahp}}

    runs = {
        "learned": {"0": run(0.70, 2.0, 0.3), "1": run(0.72, 2.2, 0.3), "2": run(0.71, 2.1, 0.3)},
        "learned, coarse heads": {"0": run(0.71, 1.8, 0.4), "1": run(0.73, 1.98, 0.4)},
        "tree": {"1": run(0.70, 1.1, 0.5), "0": run(0.69, 1.0, 0.5)},  # as they ended, the last not yet
    }
    arms = {
        name: {"runs": of, "tuned": {"batch 64, lr 0.1": 30.0, "batch 64, lr 0.2": -1.0}} for name, of in runs.items()
    }
    told = mistakes.report({"emoji": {"arms": arms}})
    assert "Trainings: learned 3, learned, coarse heads 2, tree 2." in told
    assert "| tree | least cost | 69.5 | - | - | 1.050 | - |" in told
    paired = "| -1.5 (-7.9 to +4.9) | - | - | -50.0 (-50.0 to -50.0) | - |"
    assert f"| tree, least cost | learned, largest logit {paired}" in told
    assert f"| tree, largest logit | learned, least cost {paired}" in told
    assert "| tree, least cost | learned, coarse heads, largest logit | -2.5 (-8.9 to +3.9) | - | - | -44.4" in told
    assert "| tree | 50.0 | +20.0 (+20.0 to +20.0) | +10.0 (+10.0 to +10.0) |" in told
    assert "| tree | 30.0 | - |" in told
    mistakes.draw({"emoji": {"arms": arms}}, tmp_path / "mistakes.png")
    assert (tmp_path / "mistakes.png").stat().st_size > 5000


def test_every_narrow_arm_can_be_trained_and_the_table_pairs_seeds(data_root: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "pictograms").symlink_to(data_root / "icons-400")
    narrow = narrow_heads.Narrow(options(out=tmp_path, epochs=14))
    narrow.prepare()
    found = [parsed(job.command) for job in narrow.jobs()]
    assert len(found) == 2 * 8
    assert {s.frame_from_means for s in found} == {None, 3, 7, 11}
    runs = {
        arm: {"0": {"top1": t, "top5": 90.0}, "1": {"top1": t + 1, "top5": 90.0}} for arm, t in (("a", 70), ("b", 67))
    }
    assert "| b | 2 | 67.5 | -3.0 (-3.0 to -3.0) | 90.0 |" in narrow_heads.table(runs)


def test_ways_to_grow_are_compared_with_a_learned_head() -> None:
    def run(learned: float, reserved: float) -> dict[str, Any]:
        ways = {"reserved vertices": reserved, "imprinted rows": learned}
        return {"5": {w: {"top1_old": h + 1, "top1_new": h - 1, "harmonic": h} for w, h in ways.items()}, "said": True}

    lines = growing.table({"0": run(60.0, 62.0), "1": run(61.0, 63.0)}).splitlines()
    assert lines[2] == "| 5 | reserved vertices | 63.5 | 61.5 | 62.5 (56.1 to 68.9) | +2.0 (+2.0 to +2.0) |"
    assert lines[3] == "| 5 | imprinted rows | 61.5 | 59.5 | 60.5 (54.1 to 66.9) | +0.0 (+0.0 to +0.0) |"
    assert "| 5 | reserved vertices | 63.0 | 61.0 | 62.0 | +2.0 |" in growing.table({"0": run(60.0, 62.0)})


@pytest.mark.slow
def test_names_are_added_with_few_images(data_root: Path, tmp_path: Path) -> None:
    small = ("--epochs", 2, "--tuning-epochs", 1, "--shots", 2, 3, "--seeds", 2, "--pretrain", "--batch-size", 8)
    code = f"import runpy; runpy.run_path({str(EXAMPLES / 'growing' / 'growing.py')!r}, run_name='__main__')"
    arguments = (tmp_path / "out", "--data-root", data_root, *small)
    done = commands.run(*arguments, code=code, check=True)
    assert "| 3 | reserved vertices |" in done.stdout
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (found["old"], set(found["runs"])) == (4, {"0", "1"})
    for run in found["runs"].values():
        assert run["old logits stay bit for bit"]
        assert all(set(of) == {"top1_old", "top1_new", "harmonic"} for of in run["2"].values())
    again = commands.run(*arguments, code=code, check=True)
    assert again.stdout.count("-old") == 0  # nothing is trained twice
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == found


def test_imprinted_rows_lie_along_class_means_and_old_ones_stay(data_root: Path, tmp_path: Path) -> None:
    old = timm.create_model("test_resnet", num_classes=4)
    known = ["class1", "class2", "class3", "class4"]
    hub.export(old, tmp_path / "old", label_names=known, data_config={"input_size": (3, 32, 32), "crop_pct": 1.0})
    model, names = growing.imprinted(tmp_path / "old", data_root / "icons-400")
    assert names == ["class0", *known]
    head = model.get_classifier()
    assert torch.equal(head.weight[1:], old.fc.weight)
    assert torch.equal(head.bias[1:], old.fc.bias)
    dataset = timm.data.create_dataset("", root=str(data_root / "icons-400" / "train"))
    dataset.transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
    x = torch.stack([image for image, label in dataset if label == 0])
    with torch.no_grad():
        along = old.eval().forward_head(old.forward_features(x), pre_logits=True).mean(0)
    torch.testing.assert_close(head.weight[0], along / along.norm() * old.fc.weight.norm(dim=1).mean())


@pytest.mark.slow
def test_trees_are_trained_and_measured(data_root: Path, tmp_path: Path) -> None:
    arms = ("learned, coarse heads", "tree, gram loss")
    small = ("--sources", "glyphs", "--arms", *arms, "--seeds", 1, "--epochs", 2, "--jobs", 1)
    code = f"import runpy; runpy.run_path({str(EXAMPLES / 'class_trees' / 'class_trees.py')!r}, run_name='__main__')"
    done = commands.run(tmp_path / "out", "--data-root", data_root, *small, code=code, check=True, timeout=280)
    assert " failed" not in done.stdout
    found = json.loads((tmp_path / "out" / "results.json").read_text())["sources"]["glyphs"]["arms"]
    assert tuple(found) == arms
    for of in found.values():
        assert {"severity", "hd5", "crm_hd1", "mahp", "siblings"} <= of["runs"]["0"]["seen"].keys()
        assert "mahp" in of["runs"]["0"]["held-out"]
    assert "Trainings: learned, coarse heads 1, tree, gram loss 1." in (tmp_path / "out" / "report.md").read_text()
    assert (tmp_path / "out" / "mistakes.png").stat().st_size > 5000
