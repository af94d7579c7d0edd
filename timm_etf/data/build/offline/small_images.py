"""Small grey images that packages ship whole: clothing photographs and animal silhouettes, 28 x 28, dark on white."""

import gzip
import io
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from timm_etf.data.build import image_folder
from timm_etf.data.build.image_folder import Item, Origin
from timm_etf.data.build.offline.registries import Registries, Unavailable, debian_versions

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

FASHION = "dataset-fashion-mnist"
_PARTS = ("images-idx3", "labels-idx1")
ANIMALS, ANIMALS_VERSION = "animal-mnist", "0.4"


def build_fashion(root: Path, registries: Registries, seed: int) -> dict[str, Path]:
    """Build `fashion-mnist` in `root` with its own splits, unless it is there.

    Raises:
        Unavailable: If apt cannot fetch it.
    """
    origin = Origin(FASHION, FASHION, "MIT", "https://github.com/zalandoresearch/fashion-mnist")

    def make() -> tuple[list[Origin], Iterator[Item]]:
        folder = registries.debian((FASHION,)) / FASHION / "usr/share/datasets/fashion-mnist"
        return [origin], (
            item
            for split, stem in (("train", "train"), ("test", "t10k"))
            for item in _items(split, *(read_idx(folder / f"{stem}-{part}-ubyte.gz") for part in _PARTS))
        )

    return {"fashion-mnist": image_folder.build(root / "fashion-mnist", debian_versions((FASHION,)), make)}


def build_animals(root: Path, registries: Registries, seed: int) -> dict[str, Path]:
    """Build `animal-mnist` in `root`, a random fifth of each class as test, unless it is there.

    Raises:
        Unavailable: If pip cannot fetch it, or the file is not what it should be.
    """
    origin = Origin(ANIMALS, ANIMALS, "MIT", "see the package")

    def make() -> tuple[list[Origin], list[Item]]:
        import numpy as np

        # The package's loader would import tensorflow and unpickle anything: the two files are read here instead.
        with zipfile.ZipFile(registries.wheel(ANIMALS, ANIMALS_VERSION)) as wheel:
            images, labels = (
                load_arrays(gzip.decompress(wheel.read(f"animal_mnist/data/Animal_MNIST/animal_{part}_version_3.gz")))
                for part in ("data", "label")
            )
        images = images.reshape(len(images), 28, 28)
        if images.dtype != np.uint8:
            raise Unavailable(f"{ANIMALS} {ANIMALS_VERSION} holds images of {images.dtype}, not of bytes")
        test = np.zeros(len(labels), dtype=bool)
        order = np.random.default_rng(seed).permutation(len(labels))
        for label in np.unique(labels):
            members = order[labels[order] == label]
            test[members[: len(members) // 5]] = True
        return [origin], [
            item
            for split, chosen in (("train", ~test), ("test", test))
            for item in _items(split, images[chosen], labels[chosen])
        ]

    packages = {ANIMALS: ANIMALS_VERSION, "seed of the split": str(seed)}
    return {"animal-mnist": image_folder.build(root / "animal-mnist", packages, make)}


def _items(split: str, images: "NDArray[np.uint8]", labels: "NDArray[Any]") -> Iterator[Item]:
    for number, (pixels, label) in enumerate(zip(images, labels, strict=True)):
        yield Item(split, str(label), split, f"{number:05d}", 255 - pixels)


def read_idx(path: Path) -> "NDArray[np.uint8]":
    """Array of a gzipped IDX file of bytes (MNIST's format)."""
    import numpy as np

    data = gzip.decompress(path.read_bytes())
    shape = np.frombuffer(data, dtype=">u4", count=data[3], offset=4)
    return np.frombuffer(data, dtype=np.uint8, offset=4 + 4 * data[3]).reshape(shape)


class _ArraysOnly(pickle.Unpickler):
    """Reads numpy arrays and refuses every other name, so that a pickle cannot run anything."""

    def find_class(self, module: str, name: str) -> Any:
        if (module.replace("numpy._core", "numpy.core"), name) in {
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
        }:
            return super().find_class(module.replace("numpy.core", "numpy._core"), name)
        raise Unavailable(f"refused: the file asks for {module}.{name}, which is not a numpy array")


def load_arrays(data: bytes) -> "NDArray[Any]":
    """Read a pickled numpy array of numbers.

    Raises:
        Unavailable: If the pickle holds, or would do, anything else.
    """
    import numpy as np

    try:
        array = _ArraysOnly(io.BytesIO(data)).load()
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError) as e:
        raise Unavailable(f"refused: not a pickled numpy array ({e})") from None
    if not isinstance(array, np.ndarray) or array.dtype.hasobject:
        raise Unavailable("refused: not a numpy array of numbers")
    return array
