"""Targets of a Hub: a data set of parquet files, opened by the real client and the real `datasets`."""

import io
import json
import sys

import datasets
import numpy as np
from PIL import Image

from tests.hub.conftest import Client
from tests.hub.loopback import Hub

OPEN = """
import json, sys
from pathlib import Path
from timm_etf import UsageError
from timm_etf.data.images import find_targets, open_splits
for target in find_targets(sys.argv[1:], Path("data"))[0]:
    try:
        splits = open_splits(target)
    except UsageError as e:
        print(json.dumps(str(e)))
        continue
    first = splits.test.read(0, "RGB").getpixel((0, 0))
    labels = [splits.train.labels.tolist(), splits.test.labels.tolist()]
    print(json.dumps([*labels, list(splits.train.class_names), first]))
"""


def parquet(labels: list[int], *, image: str, label: str) -> bytes:
    """Images whose red is a hundred times their label."""
    pictures = [Image.fromarray(np.full((8, 8, 3), (100 * k, 0, 0), np.uint8)) for k in labels]
    features = datasets.Features({image: datasets.Image(), label: datasets.ClassLabel(names=["cat", "dog"])})
    file = io.BytesIO()
    datasets.Dataset.from_dict({image: pictures, label: labels}, features).to_parquet(file)
    return file.getvalue()


def test_a_repository_of_parquet_files_opens_whatever_its_columns_are_called(server: Hub, client: Client) -> None:
    for name, image, label in (("animals", "image", "label"), ("renamed", "picture", "species")):
        server.add(
            f"datasets/org/{name}",
            {
                "data/train-00000-of-00001.parquet": parquet([0, 1, 0], image=image, label=label),
                "data/test-00000-of-00001.parquet": parquet([1, 0], image=image, label=label),
            },
        )
    # A process of its own: pyarrow keeps what an earlier import of datasets has told it.
    names = ("org/animals", "org/renamed", "org/nowhere")
    done = client(sys.executable, "-X", "utf8", "-c", OPEN, *names, HF_DATASETS_OFFLINE="0")
    assert done.returncode == 0, done.stderr[-2000:]
    *found, missing = map(json.loads, done.stdout.splitlines())
    assert found == [[[0, 1, 0], [1, 0], ["cat", "dog"], [100, 0, 0]]] * 2
    assert missing.startswith("Cannot open nowhere (train) of org/nowhere: ")
    assert any("resolve" in request and "test-00000" in request for request in server.seen)
