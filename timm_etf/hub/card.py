"""The model card of an exported folder, made from the files in it: no number is typed by hand."""

import json
from pathlib import Path

from timm_etf.atomic import write_text

_TEMPLATE = Path(__file__).with_name("card_template.md")


def write_card(folder: str | Path, repo_id: str | None = None) -> Path:
    """Write README.md of an exported folder from its config.json and results.json.

    Args:
        folder: Folder written by `timm_etf.hub.export`.
        repo_id: Where it will be published, `org/name`; by default the card shows how to load the folder itself.

    Returns:
        Path of the card.
    """
    from huggingface_hub import ModelCard, ModelCardData

    folder = Path(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    tag = config["pretrained_cfg"].get("tag")
    etf = config.get("etf")
    data = ModelCardData(
        library_name="timm",
        pipeline_tag="image-classification",
        tags=["image-classification", "timm", *(["etf", "fixed-classifier", "neural-collapse"] if etf else [])],
    )
    card = ModelCard.from_template(
        data,
        template_path=str(_TEMPLATE),
        name=repo_id or ".".join(filter(None, (config["architecture"], tag))),
        where=f"hf-hub:{repo_id}" if repo_id else "local-dir:FOLDER",
        config=config,
        etf=etf,
        source=results.get("source"),
        transfer=results.get("transfer"),
    )
    write_text(folder / "README.md", str(card))
    return folder / "README.md"
