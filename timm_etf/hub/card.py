"""The model card of an exported folder, made from the files in it: no number is typed by hand."""

import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from timm_etf.atomic import write_text

PICTURE = "results.png"
LOG = "log.jsonl"
DATA_LICENSES = "DATA_LICENSES.md"
"""Files that a card shows or names where they lie beside it."""

_TEMPLATE = Path(__file__).with_name("card_template.md")
_FRAMES = {"simplex": "a simplex ETF", "orthoplex": "an orthoplex", "spherical_code": "a spherical code"}


def write_card(folder: str | Path, repo_id: str | None = None) -> Path:
    """Write README.md of an exported folder from its config.json and results.json.

    Args:
        folder: Folder written by `timm_etf.hub.export`.
        repo_id: Where it will be published, `org/name`; by default the card shows how to load the folder itself.

    Returns:
        Path of the card.
    """
    folder = Path(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    write_text(folder / "README.md", card(config, results, repo_id, beside={p.name for p in folder.iterdir()}))
    return folder / "README.md"


def card(
    config: dict[str, Any],
    results: dict[str, Any],
    repo_id: str | None = None,
    *,
    license: str | None = None,
    beside: Collection[str] = (),
) -> str:
    """A model card: YAML metadata with a model-index for the Hub, and the text below it.

    Args:
        config: config.json, as `export` writes it.
        results: results.json: `source`, the source task's accuracy; `transfer`, a list of what `own_results` picks.
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
    reader, _, dataset = str(recipe.get("dataset", "")).partition("/")
    data = ModelCardData(
        library_name="timm",
        pipeline_tag="image-classification" if config["num_classes"] else "image-feature-extraction",
        license=license,
        datasets=[dataset] if reader in ("hfds", "hfids") else None,
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
            frame=_FRAMES.get(etf["frame"], f"the frame `{etf['frame']}`") if etf else None,
            whitened="_sw" in config["architecture"],
            source=results.get("source"),
            transfer=transfer,
            difference=_difference,
            losses=_losses(transfer),
            license=license,
            picture=PICTURE if PICTURE in beside else None,
            log=LOG if LOG in beside else None,
            data_licenses=DATA_LICENSES if DATA_LICENSES in beside else None,
        )
    )
    return re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n"  # what the template leaves out leaves empty lines


def own_results(compared: dict[str, Any], weights_sha256: str) -> dict[str, Any] | None:
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
        for label, hashes in compared.get("weights_sha256", {}).items()
        for i, h in enumerate(hashes)
        if h == weights_sha256
    ]
    if not places:
        return None
    label, member = places[0]
    protocols: dict[str, Any] = {}
    for protocol, found in compared["protocols"].items():
        rows = {}
        for target, cell in found["targets"].items():
            if label not in cell["models"]:
                continue
            own = cell["models"][label]["by_model"][member]
            rows[target] = {k: cell[k] for k in ("metric", "test_images")} | own
            rows[target] |= {"difference": cell.get("differences", {}).get(label)}
        mean = found["mean"] and {
            "accuracy": sum(rows[t]["accuracy"] for t in found["mean"]["targets"]) / len(found["mean"]["targets"]),
            "targets": found["mean"]["targets"],
            "difference": found["mean"]["differences"].get(label),
        }
        protocols[protocol] = {"targets": rows, "mean": mean}
    collapse = {t: by[member] for t, by in compared["collapse_of_train_features"].get(label, {}).items() if by}
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


def _name(config: dict[str, Any]) -> str:
    variant = config["architecture"] + ("_etf" if config.get("etf") else "")
    return ".".join(filter(None, (variant, config["pretrained_cfg"].get("tag"))))


def _difference(found: dict[str, Any] | None) -> str:
    if not found:
        return "-"
    low, high = found["interval_over_test_images"]
    runs = found["interval_over_runs"]
    return f"{found['mean']:+.1f} [{low:+.1f} to {high:+.1f}]" + (
        f" ({runs[0]:+.1f} to {runs[1]:+.1f})" if runs else ""
    )


def _losses(transfer: list[dict[str, Any]]) -> list[str]:
    """Targets on which the reference was ahead beyond the interval over test images."""
    return [
        f"{target} ({protocol}, {row['difference']['mean']:+.1f})"
        for part in transfer
        for protocol, found in part["protocols"].items()
        for target, row in found["targets"].items()
        if row.get("difference") and row["difference"]["interval_over_test_images"][1] < 0
    ]


def _evaluations(results: dict[str, Any]) -> list[Any]:
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
    if source := results.get("source"):
        images = {"images": source["count"], "training_seed": source["seed"]}
        found += [evaluation(source["data"], f"{k}, source task", source[k], **images) for k in ("top1", "top5")]
        geometry = [k for k in ("nc1", "cdnv", "vci") if k in source]
        found += [evaluation(source["data"], f"{k}, validation features", source[k], k, **images) for k in geometry]
    for part in results.get("transfer", []):
        for protocol, cells in part["protocols"].items():
            for target, row in cells["targets"].items():
                interval = [round(v, 2) for v in row["interval_over_test_images"]]
                about = {"images": row["test_images"], "interval_95_over_test_images": interval}
                about |= {"trainings": 1, "protocol_seeds": part["seeds_of_protocols"]}
                found.append(evaluation(target, f"{row['metric']}, {protocol}", row["accuracy"], **about))
        for target, row in part.get("collapse", {}).items():
            found += [evaluation(target, f"{k}, training features", row[k], kind=k) for k in ("nc1", "cdnv", "vci")]
    return found
