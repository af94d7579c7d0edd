"""Cards: valid for the Hub, true to the files, and with snippets that run."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import timm
from huggingface_hub import ModelCard

from tests import commands
from timm_etf import hub
from timm_etf.hub.card import card, own_results, own_searches

SOURCE = {"data": "shapes", "count": 37, "top1": 61.25, "top5": 100.0, "epochs": 3, "seed": 5}
GEOMETRY = {"nc1": 2.5, "cdnv": 0.375, "vci": 0.625, "within": 0.03125, "nc3": 1.25}

CONFIG: dict[str, Any] = {
    "architecture": "test_resnet",
    "num_classes": 10,
    "pretrained_cfg": {"input_size": [3, 160, 160], "mean": [0.5], "std": [0.5], "tag": "x"},
}

# The Hub's model card metadata, as its documentation gives it, as far as these cards use it.
TEXT: dict[str, Any] = {"type": "string", "minLength": 1}
METRIC = {
    "type": "object",
    "required": ["type", "value"],
    "properties": {"type": TEXT, "value": {"type": "number"}, "name": TEXT, "args": {"type": "object"}},
    "additionalProperties": False,
}
RESULT = {
    "type": "object",
    "required": ["task", "dataset", "metrics"],
    "properties": {
        "task": {"type": "object", "required": ["type"], "properties": {"type": {"const": "image-classification"}}},
        "dataset": {"type": "object", "required": ["name", "type"], "properties": {"name": TEXT, "type": TEXT}},
        "metrics": {"type": "array", "minItems": 1, "items": METRIC},
    },
    "additionalProperties": False,
}
SCHEMA = {
    "type": "object",
    "required": ["library_name", "pipeline_tag", "tags"],
    "properties": {
        "library_name": {"const": "timm"},
        "pipeline_tag": {"enum": ["image-classification", "image-feature-extraction"]},
        "tags": {"type": "array", "items": TEXT, "uniqueItems": True, "not": {"contains": {"const": "transformers"}}},
        "license": {"type": "string", "pattern": "^[a-z0-9.-]+$"},
        "datasets": {"type": "array", "items": {"type": "string", "pattern": "^[\\w.-]+(/[\\w.-]+)?$"}},
        "model-index": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "required": ["name", "results"],
                "properties": {"name": TEXT, "results": {"type": "array", "minItems": 1, "items": RESULT}},
                "additionalProperties": False,
            },
        },
    },
    "additionalProperties": False,
}


def compared(sha256: str = "a" * 64) -> dict[str, Any]:
    """results.json of a comparison of a learned and an ETF model on two targets, one of them failed for 10-shot."""

    def cell(test_images: int, learned: float, etf: float) -> dict[str, Any]:
        models = {
            label: {"by_model": [{"accuracy": a, "interval_over_test_images": [a - 1, a + 1]}]}
            for label, a in (("learned", learned), ("etf", etf))
        }
        interval = [etf - learned - 1, etf - learned + 1]
        difference = {"mean": etf - learned, "interval_over_test_images": interval, "interval_over_runs": None}
        return {"metric": "top1", "test_images": test_images, "models": models, "differences": {"etf": difference}}

    cells = {"kanji": cell(100, 80.0, 77.5), "digits": cell(50, 90.0, 90.25)}
    mean = {"targets": ["kanji", "digits"], "differences": {"etf": cell(150, 85.0, 83.875)["differences"]["etf"]}}
    few = {"digits": cell(50, 60.0, 65.0)}
    return {
        "weights_sha256": {"learned": ["b" * 64], "etf": [sha256]},
        "reference": "learned",
        "settings": {"seeds": 2, "versions": {"timm": "1"}},
        "protocols": {"probe": {"targets": cells, "mean": mean}, "10-shot": {"targets": few, "mean": None}},
        "collapse_of_train_features": {"etf": {"kanji": [{"nc1": 1.5, "cdnv": 0.25, "vci": 0.5, "within": 0.125}]}},
    }


def exported(tmp_path: Path, name: str = "test_resnet_etf", results: dict[str, Any] | None = None) -> Path:
    net = timm.create_model(name, num_classes=10)
    recipe = {"dataset": "hfds/someone/shapes", "opt": "sgd", "scale": [0.5, 1.0], "auto_augment": None}
    return hub.export(net, tmp_path / "model", results=results, recipe=recipe, tag="shapes")


def metadata(text: str) -> dict[str, Any]:
    data = ModelCard(text).data.to_dict()
    jsonschema.validate(data, SCHEMA)
    return data


@pytest.mark.parametrize("name", ["test_resnet_etf", "test_resnet", "test_vit_etf", "resnet10t_sw_etf"])
@pytest.mark.parametrize("results", [{}, {"source": SOURCE}])
def test_metadata_is_what_the_hub_takes(tmp_path: Path, name: str, results: dict[str, Any]) -> None:
    folder = exported(tmp_path, name, results)
    data = metadata((folder / "README.md").read_text())
    assert ("model-index" in data) == bool(results)
    assert ("etf" in data["tags"]) == name.endswith("_etf")
    assert data.get("datasets") == (["someone/shapes"] if name.endswith("_etf") else None)


def test_numbers_are_those_of_the_files(tmp_path: Path) -> None:
    folder = exported(tmp_path, results={"source": SOURCE})
    config = json.loads((folder / "config.json").read_text())
    own = own_results(compared(), "a" * 64)
    source = SOURCE | GEOMETRY
    text = card(config, {"source": source, "transfer": [own]}, "org/name", license="mit", beside={"results.png"})
    data = metadata(text)
    [model] = data["model-index"]
    assert model["name"] == "name"
    found = {(r["dataset"]["type"], m["name"]): m for r in model["results"] for m in r["metrics"]}
    assert found["shapes", "top1, source task"]["value"] == 61.25
    assert found["shapes", "vci, validation features"]["value"] == 0.625
    assert found["kanji", "top1, probe"]["value"] == 77.5
    assert found["kanji", "top1, probe"]["args"]["interval_95_over_test_images"] == [76.5, 78.5]
    assert (found["kanji", "nc1, training features"]["type"], found["kanji", "nc1, training features"]["value"]) == (
        "nc1",
        1.5,
    )
    assert found["digits", "top1, 10-shot"]["args"]["trainings"] == 1
    for line in (
        "| shapes | 37 | 61.25 | 100.00 | 3 | 5 |",
        "How collapsed the validation features are (smaller is more so): NC1 2.5,",
        "CDNV 0.375, VCI 0.625, tr C / d 0.0312; distance of the classifier from self-duality",
        "(NC3, 0 to 4) 1.25.",
        "| target | test images | probe | 10-shot |",
        "| kanji | 100 | 77.5 [76.5 to 78.5] | - |",
        "| digits | 50 | 90.2 [89.2 to 91.2] | 65.0 [64.0 to 66.0] |",
        "| **mean** | | **83.9** | - |",
        "| kanji | -2.5 [-3.5 to -1.5] | - |",
        "| kanji | 1.5 | 0.25 | 0.5 | 0.125 |",
        "- `learned` was ahead, beyond the interval over test images, on: kanji (probe, -2.5).",
        "| scale | 0.5 to 1.0 |",
        "![Accuracy on the source task over epochs, and on other tasks](results.png)",
    ):
        assert line in text.splitlines(), line
    assert "simplex ETF of 10 classes" in text
    assert "auto_augment" not in text
    assert 'timm_etf.create_model("hf-hub:org/name", pretrained=True)' in text
    assert own_results(compared("c" * 64), "a" * 64) is None


@pytest.mark.parametrize("lacking", [*GEOMETRY, *SOURCE, None])
@pytest.mark.parametrize("how", ["missing", "null"])
def test_a_number_that_is_missing_is_a_dash_and_nothing_else_is(lacking: str | None, how: str) -> None:
    """Validation leaves out what is not finite, as CDNV is where two classes have one mean."""
    source = SOURCE | GEOMETRY
    if lacking and how == "missing":
        del source[lacking]
    elif lacking:
        source[lacking] = None
    text = card(CONFIG, {"source": source})
    metadata(text)
    dash = {
        "nc1": "NC1 -,",
        "cdnv": "CDNV -,",
        "vci": "VCI -,",
        "within": "tr C / d -;",
        "nc3": "(NC3, 0 to 4) -.",
        "data": "| - | 37 |",
        "count": "| - | 61.25 |",
        "top1": "| 37 | - |",
        "top5": "| 61.25 | - |",
        "epochs": "| 100.00 | - |",
        "seed": "| 3 | - |",
    }
    for name, shown in dash.items():
        assert (shown in text) == (name == lacking), name


def test_an_export_whose_collapse_is_not_finite_has_a_card(tmp_path: Path) -> None:
    source = {k: v for k, v in (SOURCE | GEOMETRY).items() if k not in ("cdnv", "vci")}
    text = (exported(tmp_path, results={"source": source}) / "README.md").read_text()
    assert "CDNV -, VCI -, tr C / d 0.0312" in text


def test_parts_of_a_comparison_that_are_missing() -> None:
    found = compared()
    found["collapse_of_train_features"]["etf"] = {"kanji": [{"nc1": 1.5, "cdnv": None}], "digits": []}
    own = own_results(found, "a" * 64)
    text = card(CONFIG, {"transfer": [own]})
    assert "| kanji | 1.5 | - | - | - |" in text
    names = {m["name"] for r in metadata(text)["model-index"][0]["results"] for m in r["metrics"]}
    assert names == {"nc1, training features", "top1, probe", "top1, 10-shot"}
    del own["collapse"], own["reference"]
    text = card(CONFIG, {"transfer": [own]})
    assert "Geometry of" not in text
    assert "Its method less" not in text


def test_a_checkpoint_gets_its_own_collapse_or_none() -> None:
    found = compared()
    found["weights_sha256"]["etf"] = ["c" * 64, "a" * 64]
    for cells in found["protocols"].values():
        for cell in cells["targets"].values():
            cell["models"]["etf"]["by_model"] *= 2
    # Of two trainings one has values, and an old file does not say which.
    assert own_results(found, "a" * 64)["collapse"] == {}
    found["collapse_of_train_features"]["etf"]["kanji"] = [{"nc1": 7.0}, None]
    assert own_results(found, "a" * 64)["collapse"] == {}
    assert own_results(found, "c" * 64)["collapse"] == {"kanji": {"nc1": 7.0}}


def test_a_mean_is_over_the_labels_own_targets() -> None:
    found = compared()
    found["protocols"]["10-shot"]["mean"] = {
        "targets": ["kanji"],
        "targets_by_label": {"learned": ["kanji"], "etf": ["digits"]},
        "differences": {},
    }
    mean = own_results(found, "a" * 64)["protocols"]["10-shot"]["mean"]
    assert (mean["accuracy"], mean["targets"], mean["difference"]) == (65.0, ["digits"], None)


def searched(sha256: str = "a" * 64) -> dict[str, Any]:
    """results.json of a retrieval study of one learned model and two ETF models, the second of which is ours."""

    def pair(queries: str, gallery: str, trainings: list[list[int]], *recalls: float) -> dict[str, Any]:
        spaces = {"coordinates": list(recalls), "Procrustes 30": list(recalls)}
        spaces |= {"features": [r / 10 for r in recalls]} if queries == gallery else {}
        found = {space: {"recall@1": values, "mAP": values} for space, values in spaces.items()}
        return {"queries": queries, "gallery": gallery, "trainings": trainings, "spaces": found}

    pairs = [
        pair("learned", "learned", [[0, 0]], 90.0),
        pair("learned", "etf", [[0, 1], [0, 2]], 50.0, 60.0),
        pair("etf", "etf", [[1, 1], [2, 2]], 70.0, 80.0),
        pair("etf", "learned", [[1, 0], [2, 0]], 30.0, 40.0),
        pair("etf", "etf", [[1, 2], [2, 1]], 10.0, 20.0),
    ]
    on = {"gallery": 122, "queries": 37, "weights_sha256": ["b" * 64, None, sha256], "pairs": pairs}
    head = {"settings": {}, "weights_sha256": {}, "notes": [], "missing": {}}
    return head | {"retrieval": {"bars": on | {"compatibility": {}}}}


def test_what_an_index_of_it_is_worth() -> None:
    assert own_searches(searched("c" * 64), "a" * 64) == {}
    text = card(CONFIG, {"retrieval": own_searches(searched(), "a" * 64)})
    metadata(text)
    lines = text.splitlines()
    start = lines.index(
        "| data (gallery, queries) | queries by | gallery of | pairs | features | coordinates | centred |"
    )
    assert lines[start + 2 : start + 8] == [
        "| bars (122, 37) | this | this | 1 | 8.0 | 80.0 | - |",
        "| bars (122, 37) | this | learned | 1 | - | 40.0 | - |",
        "| bars (122, 37) | this | etf | 1 | 2.0 | 20.0 | - |",
        "| bars (122, 37) | learned | this | 1 | - | 60.0 | - |",
        "| bars (122, 37) | etf | this | 1 | 1.0 | 10.0 | - |",
        "",
    ]


@pytest.mark.parametrize("name", ["test_resnet_etf", "resnet10t_sw_etf"])
def test_snippets_run(tmp_path: Path, images: Path, name: str) -> None:
    folder = exported(tmp_path, name)
    text = (folder / "README.md").read_text()
    code = "\n".join(re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL))
    assert code.count("create_model(") == 4
    assert "range(5)" in code
    code = code.replace("FOLDER", str(folder)).replace("range(5)", "range(1)")
    shutil.copytree(images / "validation", tmp_path / "DATA")
    done = commands.run(code=code, cwd=tmp_path, fresh=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("init", "base"),
    [
        ("resnet50.a1_in1k", "timm/resnet50.a1_in1k"),
        ("resnet50", "timm/resnet50.a1_in1k"),
        ("hf-hub:ORG/NAME@v1", "ORG/NAME"),
        ("resnet10t_etf.icons400", "timm-etf/resnet10t_etf.icons400"),
        ("local-dir:somewhere", None),
        ("weights.safetensors", None),
        (None, None),
    ],
)
def test_weights_that_training_started_from_are_named(init: str | None, base: str | None) -> None:
    config = {"architecture": "resnet50", "num_classes": 5, "pretrained_cfg": {"input_size": [3, 64, 64]}}
    config["pretrained_cfg"] |= {"mean": [0.5], "std": [0.5]}
    etf = {"frame": "simplex", "seed": 0, "num_classes": 5, "coherence": -0.25, "bound": -0.25, "dims": ["fc"]}
    etf |= {"logit_scale": 1.0, "projector": None, "feature_norm": False, "versions": {}, "recipe": {"init": init}}
    text = card({**config, "etf": etf}, {})
    data = ModelCard(text).data
    assert data.base_model == base
    assert ("started from the weights" in text) == bool(init)
