"""An index that outlives its model: images that one backbone has indexed are found by another, none embedded again.

    pip install faiss-cpu
    python examples/upgrade_an_index/upgrade.py OUT                        # draws its images: extra [demo]
    python examples/upgrade_an_index/upgrade.py OUT --old NAME --new NAME --data MY_IMAGES

MY_IMAGES/train/CLASS/* is the gallery, MY_IMAGES/test/CLASS/* are the queries. OUT receives an index for each space,
the name of its coordinate system beside it, and results.json. Names are those of `timm_etf.create_model`.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faiss
import timm
import torch
from tqdm import tqdm

import timm_etf
from timm_etf import UsageError
from timm_etf.atomic import atomic_file, write_json
from timm_etf.data import build_targets
from timm_etf.data.images import Images, find_targets, open_splits
from timm_etf.embedding import Embedding
from timm_etf.errors import one_line_errors
from timm_etf.report.results import write

SPACES = ("features", "coordinates", "centred")
FEW = 100
"""Gallery images without labels whose mean is taken out of the centred coordinates, at most."""


def batches(model: Any, images: Images, most: int | None = None) -> Iterator[torch.Tensor]:
    """Images as the model expects them."""
    config = timm.data.resolve_data_config(model=model)
    transform, mode = timm.data.create_transform(**config), "L" if config["input_size"][0] == 1 else "RGB"
    numbers = torch.arange(len(images)) if most is None else torch.randperm(len(images), generator=draw())[:most]
    for some in tqdm(numbers.split(64), desc=images.name, unit="batch", leave=False):
        yield torch.stack([transform(images.read(i, mode)) for i in some.tolist()])


def draw() -> torch.Generator:
    """The same few images for every model."""
    return torch.Generator().manual_seed(0)


def embedded(model: Any, images: Images, space: str, mean: torch.Tensor) -> Embedding:
    """Images in a space; the mean is taken out of centred coordinates."""
    if space == "features":
        return timm_etf.embed(model, batches(model, images), "features")
    return timm_etf.embed(model, batches(model, images), mean=mean if space == "centred" else None)


def write_index(path: Path, images: Embedding) -> None:
    """An exact index, and beside it the coordinate system that it is in."""
    index = faiss.IndexFlatIP(images.vectors.shape[1])
    index.add(images.vectors.numpy())
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as new:
        faiss.write_index(index, str(new))
    write_json(path.with_suffix(".json"), {"system": images.system})


def search(path: Path, queries: Embedding, count: int = 1) -> torch.Tensor:
    """Numbers of the nearest images of an index, [n, count].

    Raises:
        UsageError: If the index is in another coordinate system than the queries.
    """
    system = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["system"]
    return nearest(path, queries.require(system), count)


def nearest(path: Path, queries: Embedding, count: int = 1) -> torch.Tensor:
    """The same without asking what the numbers mean."""
    return torch.from_numpy(faiss.read_index(str(path)).search(queries.vectors.numpy(), count)[1])


def upgrade(old: Any, new: Any, data: str, out: Path) -> dict[str, Any]:
    """Index a gallery with the old model and search it with both; recall@1 in percent in every space."""
    targets, missing = find_targets([data], out / "data")
    if missing:
        raise UsageError(": ".join(next(iter(missing.items()))))
    splits = open_splits(targets[0])
    gallery, y = splits.train, torch.from_numpy(splits.train.labels)
    wanted = torch.from_numpy(splits.test.labels)
    found: dict[str, Any] = {"gallery": len(gallery), "queries": len(splits.test)}

    models = {"old": old, "new": new}
    means = {who: timm_etf.embed(m, batches(m, gallery, FEW)).vectors.mean(0) for who, m in models.items()}

    def recall(numbers: torch.Tensor) -> float:
        return 100 * (y[numbers] == wanted[:, None]).any(1).double().mean().item()

    for space in SPACES:
        index, again = (out / splits.target.name / f"{space}-{who}.faiss" for who in ("old", "new"))
        asked = {who: embedded(model, splits.test, space, means[who]) for who, model in models.items()}
        write_index(index, embedded(old, gallery, space, means["old"]))
        cells: dict[str, float | None] = {"before": recall(search(index, asked["old"]))}
        try:
            cells["after"] = recall(search(index, asked["new"]))
        except UsageError as refused:
            print(f"{space}: {refused}")
            same = asked["new"].vectors.shape[1] == asked["old"].vectors.shape[1]
            cells["after"] = recall(nearest(index, asked["new"])) if same else None
            cells["refused"] = True
        write_index(again, embedded(new, gallery, space, means["new"]))
        found[space] = cells | {"indexed again": recall(search(again, asked["new"]))}
    return found


def table(results: dict[str, Any]) -> str:
    """The results as a Markdown table."""
    lines = ["| recall@1, % | before | after, the index as it was | all images embedded again |", "|---|---|---|---|"]
    for data, found in results["data"].items():
        for space in SPACES:
            cells = (found[space][when] for when in ("before", "after", "indexed again"))
            lines.append(f"| {data}, {space} | {' | '.join('-' if c is None else f'{c:.1f}' for c in cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--old", default="resnet10t_etf")
    parser.add_argument("--new", default="resnet50_etf")
    parser.add_argument("--data", nargs="+", help="image folders; by default Greek letters, drawn here")
    options = parser.parse_args()
    with one_line_errors():
        old, new = (timm_etf.create_model(name, pretrained=True) for name in (options.old, options.new))
        # Before any work: do they share coordinates at all?
        one, other = (timm_etf.embed(m, torch.zeros(1, *m.pretrained_cfg["input_size"])) for m in (old, new))
        other.require(one.system)
        data = options.data or [str(build_targets(options.out / "data")["letters-greek"])]
        results: dict[str, Any] = {"old": options.old, "new": options.new, "data": {}}
        for name in data:
            results["data"][Path(name).name] = upgrade(old, new, name, options.out)
        write(options.out / "results.json", results)
        print(table(results))


if __name__ == "__main__":
    main()
