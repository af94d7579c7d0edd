from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shards(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The test images as WebDataset shards: two of training images, one of validation images."""
    import webdataset

    root = tmp_path_factory.mktemp("shards")
    for split, count in (("train", 2), ("validation", 1)):
        paths = sorted((images / split).rglob("*.png"))
        for shard in range(count):
            with webdataset.TarWriter(str(root / f"{split}-{shard:04d}.tar")) as tar:
                for number, path in enumerate(paths[shard::count]):
                    label = str(int(path.parent.name[-1])).encode()
                    tar.write({"__key__": f"{shard}-{number:05d}", "png": path.read_bytes(), "cls": label})
    return root
