"""Shared by all tests: no network, and a small set of real image files."""

import atexit
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image

# Before any library reads them: a test that would reach for the network fails instead.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
# Workers and the processes they start share few cores, and torch's threads wait for each other by spinning.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Spherical codes and widths are cached in this run's own folder: tests neither read nor leave anything elsewhere. The
# worker processes inherit it.
if "TIMM_ETF_TEST_CACHE" not in os.environ:
    folder = tempfile.TemporaryDirectory(prefix="timm_etf-")
    atexit.register(folder.cleanup)
    os.environ["HF_ASSETS_CACHE"] = os.environ["TIMM_ETF_TEST_CACHE"] = folder.name

NUM_CLASSES = 5


def write_images(root: Path, split: str, per_class: int) -> None:
    """Image folder split of 32 x 32 colour PNGs: a noisy picture with a bright bar, whose place is the class."""
    rng = np.random.default_rng(len(split))
    for k in range(NUM_CLASSES):
        folder = root / split / f"class{k}"
        folder.mkdir(parents=True)
        for i in range(per_class + k % 2):  # classes of two sizes, so that nothing divides evenly
            pixels = rng.integers(0, 60, (32, 32, 3), dtype=np.uint8)
            pixels[:, 6 * k : 6 * k + 6] = 220
            Image.fromarray(pixels).save(folder / f"{i}.png")


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Image folder with 122 training and 37 validation images of five classes."""
    root = tmp_path_factory.mktemp("images")
    write_images(root, "train", 24)
    write_images(root, "validation", 7)
    return root


@pytest.fixture(scope="session")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with every embedded data set, drawn once for all of pytest's processes. Read-only by convention."""
    from timm_etf.data import build_targets

    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared
    with FileLock(shared / "embedded.lock"):
        build_targets(shared / "embedded")
    return shared / "embedded"
