"""The model card of an exported folder, made from the files in it: no number is typed by hand."""

import json
import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from timm_etf.atomic import write_text
from timm_etf.frames import ClassTree
from timm_etf.report.results import (
    Checkpoint,
    Difference,
    Own,
    OwnGallery,
    OwnProtocol,
    OwnRow,
    OwnSearch,
    Pair,
    Retrieval,
    Transfer,
    read,
)

PICTURE = "results.png"
LOG = "log.jsonl"
DATA_LICENSES = "DATA_LICENSES.md"
"""Files that a card shows or names where they lie beside it."""

_TEMPLATE = Path(__file__).with_name("card_template.md")
_GEOMETRY = ("nc1", "cdnv", "vci")
_FRAMES = {"simplex": "a simplex ETF", "orthoplex": "an orthoplex", "spherical_code": "a spherical code"}
_FRAMES |= {"hierarchy": "a frame whose cosines follow a tree", "own": "a frame of its maker's own"}
_TREE_LINES = 40


def write_card(folder: str | Path, repo_id: str | None = None) -> Path:
    """Write README.md of an exported folder from its config.json and results.json.

    Args:
        folder: Folder written by `timm_etf.hub.export`.
        repo_id: Where it will be published, `org/name`; by default the card shows how to load the folder itself.

    Returns:
        Path of the card.

    Raises:
        UsageError: If results.json is not a checkpoint's.
    """
    folder = Path(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    results = read(folder / "results.json", Checkpoint)
    write_text(folder / "README.md", card(config, results, repo_id, beside={p.name for p in folder.iterdir()}))
    return folder / "README.md"


def card(
    config: dict[str, Any],
    results: Checkpoint,
    repo_id: str | None = None,
    *,
    license: str | None = None,
    beside: Collection[str] = (),
) -> str:
    """A model card: YAML metadata with a model-index for the Hub, and the text below it.

    Args:
        config: config.json, as `export` writes it.
        results: results.json: `source`, the source task's accuracy; `transfer`, a list of what `own_results` picks;
            `retrieval`, what `own_searches` does.
        repo_id: Where the model is published; by default the card shows how to load a folder.
        license: The weights' licence, one of the Hub's identifiers such as `apache-2.0`.
        beside: Names of the files next to it: pictures are shown and a log and licences named if they are there.

    Returns:
        The whole README.md.
    """
    from huggingface_hub import ModelCard, ModelCardData

    etf = config.get("etf")
    name = (repo_id or "").rpartition("/")[2] or _name(config)
    transfer = results.get("transfer", [])
    evaluations = _evaluations(results)
    recipe = (etf or {}).get("recipe", {})
    origin: dict[str, Any] = next(iter(((etf or {}).get("origin") or {}).values()), {})
    license = license or origin.get("license")
    reader, _, dataset = str(recipe.get("dataset", "")).partition("/")
    data = ModelCardData(
        library_name="timm",
        pipeline_tag="image-classification" if config["num_classes"] else "image-feature-extraction",
        license=license,
        datasets=[dataset] if reader in ("hfds", "hfids") else None,
        base_model=_base_model(origin.get("from") or recipe.get("init")),
        model_name=name,
        eval_results=evaluations or None,
        tags=["image-classification", "timm", *(["etf", "fixed-classifier", "neural-collapse"] if etf else [])],
    )
    if not evaluations:  # without results the name would be metadata of its own
        del data.model_name
    text = str(
        ModelCard.from_template(
            data,
            template_path=str(_TEMPLATE),
            name=name,
            where=f"hf-hub:{repo_id}" if repo_id else "local-dir:FOLDER",
            config=config,
            etf=etf,
            recipe=recipe,
            origin=origin,
            tree=_tree(etf),
            frame=_FRAMES.get(etf["frame"], f"the frame `{etf['frame']}`") if etf else None,
            whitened="_sw" in config["architecture"],
            source=results.get("source"),
            finetuned=results.get("finetuned"),
            transfer=transfer,
            retrieval=results.get("retrieval", {}),
            difference=_difference,
            number=_number,
            losses=_losses(transfer),
            license=license,
            picture=PICTURE if PICTURE in beside else None,
            log=LOG if LOG in beside else None,
            data_licenses=DATA_LICENSES if DATA_LICENSES in beside else None,
        )
    )
    return re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n"  # what the template leaves out leaves empty lines


def own_results(compared: Transfer, weights_sha256: str) -> Own | None:
    """What a transfer comparison found for one checkpoint.

    Args:
        compared: results.json of `timm-etf transfer`.
        weights_sha256: Hash of the checkpoint's weights.

    Returns:
        Its accuracies by protocol and target, with the difference of its method from the reference; None if the
        comparison did not contain these weights.
    """
    places = [
        (label, i)
        for label, hashes in compared["weights_sha256"].items()
        for i, h in enumerate(hashes)
        if h == weights_sha256
    ]
    if not places:
        return None
    label, member = places[0]
    protocols: dict[str, OwnProtocol] = {}
    for protocol, found in compared["protocols"].items():
        rows: dict[str, OwnRow] = {}
        for target, cell in found["targets"].items():
            if label in cell["models"]:
                rows[target] = {
                    "metric": cell["metric"],
                    "test_images": cell["test_images"],
                    **cell["models"][label]["by_model"][member],
                    "difference": cell.get("differences", {}).get(label),
                }
        protocols[protocol] = {"targets": rows, "mean": None}
        if mean := found["mean"]:
            targets = mean["targets_by_label"].get(label, []) if "targets_by_label" in mean else mean["targets"]
            if targets:
                protocols[protocol]["mean"] = {
                    "accuracy": sum(rows[t]["accuracy"] for t in targets) / len(targets),
                    "targets": targets,
                    "difference": mean["differences"].get(label),
                }
    # Files without a version leave members out that have no collapse: then it is not known whose the others are.
    members = len(compared["weights_sha256"][label])
    collapse = {
        target: own
        for target, by_member in compared["collapse_of_train_features"].get(label, {}).items()
        if len(by_member) == members and (own := by_member[member])
    }
    return {
        "label": label,
        "weights_sha256": weights_sha256,
        "reference": None if label == compared["reference"] else compared["reference"],
        "trainings": {la: len(hashes) for la, hashes in compared["weights_sha256"].items()},
        "seeds_of_protocols": compared["settings"]["seeds"],
        "versions": compared["settings"]["versions"],
        "protocols": protocols,
        "collapse": collapse,
    }


def own_searches(compared: Retrieval, weights_sha256: str) -> dict[str, OwnGallery]:
    """What a retrieval study found for one checkpoint, by data set.

    Args:
        compared: results.json of `timm-etf retrieval`.
        weights_sha256: Hash of the checkpoint's weights.

    Returns:
        recall@1 of its queries in its own gallery, in those of others, and of theirs in its own; empty if the study did
        not contain these weights.
    """
    found: dict[str, OwnGallery] = {}
    for data, on in compared["retrieval"].items():
        if weights_sha256 in on["weights_sha256"]:
            number = on["weights_sha256"].index(weights_sha256)
            searches = [s for role in (0, 1) for pair in on["pairs"] if (s := _own_search(pair, number, role))]
            found[data] = {"gallery": on["gallery"], "queries": on["queries"], "searches": searches}
    return found


def _own_search(pair: Pair, number: int, role: int) -> OwnSearch | None:
    """A checkpoint's part of a pair of labels: of its queries (role 0), or of its gallery and the others' queries."""
    places = [i for i, of in enumerate(pair["trainings"]) if of[role] == number]
    within = pair["trainings"][0][0] == pair["trainings"][0][1]
    if not places or (within and role):
        return None
    spaces = {s: sum(found["recall@1"][i] for i in places) / len(places) for s, found in pair["spaces"].items()}
    return {
        "queries": pair["queries"] if role else None,
        "gallery": None if role or within else pair["gallery"],
        "pairs": len(places),
        "spaces": spaces,
    }


def _tree(etf: dict[str, Any] | None) -> str:
    """The tree that the frame follows, as text, its first groups."""
    if not (etf and etf.get("tree")):
        return ""
    lines = str(ClassTree(tuple(etf["tree"]["paths"]))).splitlines()
    return "\n".join(
        lines[:_TREE_LINES] + [f"... and {len(lines) - _TREE_LINES} more groups"] * (len(lines) > _TREE_LINES)
    )


def _name(config: dict[str, Any]) -> str:
    variant = config["architecture"] + ("_etf" if config.get("etf") else "")
    return ".".join(filter(None, (variant, config["pretrained_cfg"].get("tag"))))


def _number(values: Mapping[str, Any], key: str, form: str = "%.3g") -> str:
    """A measured number, or a dash where there is none, as where a metric is not finite."""
    value = values.get(key)
    return form % value if isinstance(value, int | float) and math.isfinite(value) else "-"


def _difference(found: Difference | None) -> str:
    if not found:
        return "-"
    low, high = found["interval_over_test_images"]
    shown = f"{found['mean']:+.1f} [{low:+.1f} to {high:+.1f}]"
    if runs := found["interval_over_runs"]:
        shown += f" ({runs[0]:+.1f} to {runs[1]:+.1f})"
    if both := found.get("interval_over_runs_and_images"):
        shown += f" {{{both[0]:+.1f} to {both[1]:+.1f}}}"
    return shown


def _losses(transfer: list[Own]) -> list[str]:
    """Targets on which the reference was ahead beyond the interval over test images."""
    return [
        f"{target} ({protocol}, {difference['mean']:+.1f})"
        for part in transfer
        for protocol, found in part["protocols"].items()
        for target, row in found["targets"].items()
        if (difference := row.get("difference")) and difference["interval_over_test_images"][1] < 0
    ]


def _base_model(init: str | None) -> str | None:
    """Repository on the Hub of the weights that training started from, if they have one."""
    import timm

    source, colon, name = (init or "").partition(":")
    if colon:
        return name.partition("@")[0] if source in ("hf-hub", "hf_hub") else None
    if not timm.is_model(source) or (cfg := timm.get_pretrained_cfg(source)) is None or not cfg.hf_hub_id:
        return None
    return cfg.hf_hub_id + (f"{cfg.architecture}.{cfg.tag}" if cfg.hf_hub_id.endswith("/") else "")


def _evaluations(results: Checkpoint) -> list[Any]:
    """The model-index: the source task and every target under every protocol."""
    from huggingface_hub import EvalResult

    def evaluation(dataset: str, metric: str, value: float, kind: str = "accuracy", **args: Any) -> EvalResult:
        return EvalResult(
            task_type="image-classification",
            dataset_type=dataset,
            dataset_name=dataset,
            metric_type=kind,
            metric_name=metric,
            metric_value=float(f"{value:.4g}"),
            metric_args=args,
        )

    found = []
    if (source := results.get("source")) and source.get("data"):
        counted = {"images": source.get("count"), "training_seed": source.get("seed")}
        images: dict[str, Any] = {k: v for k, v in counted.items() if v is not None}
        if teacher := source.get("teacher"):
            for k in _measured(source, "top1", "top5"):
                found.append(
                    evaluation(source["data"], f"{k} agreement with {teacher}", source[k], "agreement", **images)
                )
            source = {}
        for k in _measured(source, "top1", "top5"):
            found.append(evaluation(source["data"], f"{k}, source task", source[k], **images))
        for k in _measured(source, *_GEOMETRY):
            found.append(evaluation(source["data"], f"{k}, validation features", source[k], k, **images))
    for part in results.get("transfer", []):
        for protocol, cells in part["protocols"].items():
            for target, row in cells["targets"].items():
                interval = [round(v, 2) for v in row["interval_over_test_images"]]
                about: dict[str, Any] = {"images": row["test_images"], "interval_95_over_test_images": interval}
                about |= {"trainings": 1, "protocol_seeds": part["seeds_of_protocols"]}
                found.append(evaluation(target, f"{row['metric']}, {protocol}", row["accuracy"], **about))
        for target, collapse in part.get("collapse", {}).items():
            for k in _measured(collapse, *_GEOMETRY):
                found.append(evaluation(target, f"{k}, training features", collapse[k] or 0.0, kind=k))
    return found


def _measured(values: Mapping[str, Any], *keys: str) -> list[str]:
    """Those of the keys that have a number."""
    return [k for k in keys if _number(values, k) != "-"]
