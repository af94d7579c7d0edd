"""`timm-etf` on small images that are decoded once: study.py's processes run its commands here.

A small network trains faster on a GPU than its images are decoded and cropped on the CPU. So every folder of images is
decoded into one file that all processes share, and training crops are taken from it on the device: boxes are drawn as
timm's RandomResizedCropAndInterpolation draws them, pixels are bilinear at twice the size and then averaged. Images
that are not augmented go through timm's own transforms, once. The rest is the package's: order, loop, losses,
protocols.
"""

import fcntl
import hashlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing import parent_process
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.functional import pil_to_tensor

from timm_etf import cli
from timm_etf.atomic import atomic_file
from timm_etf.features import extract
from timm_etf.pretrain import data, setup
from timm_etf.transfer import fine_tuning

SIDE = 64
"""Pixels of the images that crops are taken from: as large as the offline data's."""

folder = Path()
"""Where decoded images are."""

running = threading.Lock()
"""Held while a command runs."""


def device() -> torch.device:
    """Where images are cropped."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def decoded(key: object, images: Any, count: int) -> NDArray[Any]:
    """Every one of `images(index)`, a tensor each, as one array on disk [n, C, H, W]."""
    path = folder / f"{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}.npy"
    folder.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one process decodes, and the others wait for it
        if not path.exists():
            with ThreadPoolExecutor() as pool:
                stacked = torch.stack(list(pool.map(images, range(count)))).numpy()
            with atomic_file(path) as new, new.open("wb") as file:
                np.save(file, stacked)
    array: NDArray[Any] = np.load(path, mmap_mode="r")
    return array


def pixels(image: Image.Image) -> Tensor:
    """Pixels that crops are taken from, uint8 [C, SIDE, SIDE]."""
    return pil_to_tensor(image if image.size == (SIDE, SIDE) else image.resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def boxes(count: int, scale: Any, ratio: Any, generator: torch.Generator) -> Tensor:
    """Left, top, width and height of crops, as shares of a square image [n, 4].

    Area and logarithm of the aspect ratio are uniform; of ten draws the first that fits in is taken, else the whole.
    """
    drawn = torch.rand(count, 10, 4, generator=generator, device=generator.device)
    area = scale[0] + (scale[1] - scale[0]) * drawn[..., 0]
    low, high = np.log(ratio)
    aspect = (low + (high - low) * drawn[..., 1]).exp()
    size = torch.stack([(area * aspect).sqrt(), (area / aspect).sqrt()], -1)
    fits = (size <= 1).all(-1)
    first = fits.float().argmax(1)
    rows = torch.arange(count, device=drawn.device)
    chosen = torch.where(fits[rows, first, None], size[rows, first], torch.ones_like(size[rows, first]))
    return torch.cat([(1 - chosen) * drawn[rows, first, 2:], chosen], 1)


def crops(images: Tensor, taken: Tensor, size: int) -> Tensor:
    """The boxes `taken` [n, 4] of uint8 images [n, C, H, W], at size x size pixels, float32 from 0 to 255."""
    at = torch.linspace(0, 2 * size - 1, 2 * size, device=images.device).add(0.5) / (2 * size)
    x, y = (2 * (taken[:, i, None] + at * taken[:, 2 + i, None]) - 1 for i in (0, 1))
    n, m = x.shape
    grid = torch.stack([x[:, None, :].expand(n, m, m), y[:, :, None].expand(n, m, m)], -1)
    large = F.grid_sample(images.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
    return F.avg_pool2d(large, 2)


def seeded(*seed: int) -> torch.Generator:
    """A generator of the device, as a function of whole numbers."""
    return torch.Generator(device()).manual_seed(hash(seed) % 2**63)


class Training(data.TrainLoader):
    """Training batches as `TrainLoader` orders them; a crop is a function of seed, epoch and batch."""

    def __init__(self, dataset: Any, config: Any, rank: int, world_size: int) -> None:
        super().__init__(dataset, config, rank, world_size)
        if config.hflip or config.color_jitter or config.auto_augment or config.aug_repeats > 1:
            raise ValueError("images in memory are cropped and nothing else")
        self.size = config.img_size
        samples, mode = dataset.reader.samples, dataset.input_img_mode

        def read(index: int) -> Tensor:
            with Image.open(samples[index][0]) as image:
                return pixels(image.convert(mode))

        array = decoded(("train", dataset.reader.root, len(samples), mode), read, len(samples))
        self.images = torch.from_numpy(np.array(array)).to(device())
        self.labels = torch.tensor([label for _, label in samples], device=device())

    def _batches(self, epoch: int, first_batch: int) -> Iterator[Any]:
        source: Any = self.source
        source.start_at(epoch, first_batch)
        order = (torch.tensor(list(source)) % self.num_samples).to(device())
        for number, rows in enumerate(order.split(self.config.batch_size), first_batch):
            taken = boxes(
                len(rows), self.config.scale, self.config.ratio, seeded(self.config.seed, self.rank, epoch, number)
            )
            yield crops(self.images[rows], taken, self.size).round_().byte(), self.labels[rows]


class Batches(list[Any]):
    """A loader of what is there already."""

    def close(self) -> None:
        """Nothing is open."""


def validation(dataset: Any, config: Any, rank: int, world_size: int) -> Batches:
    """Validation batches of a single process."""
    key = ("val", dataset.reader.root, len(dataset), repr(dataset.transform), dataset.input_img_mode)
    array = decoded(key, lambda index: torch.as_tensor(dataset[index][0]), len(dataset))
    images = torch.from_numpy(np.array(array)).to(device())
    labels = torch.tensor([label for _, label in dataset.reader.samples])
    return Batches(zip(images.split(512), labels.split(512), strict=True))


def still(images: Any, transform: Any, mode: str) -> NDArray[Any]:
    """A split's transformed images."""
    key = (images.fingerprint, repr(transform), mode)
    return decoded(key, lambda index: transform(images.read(index, mode)), len(images))


def features_loader(decoded_images: Any, batch_sampler: Any, **kwargs: Any) -> Iterator[Any]:
    """Batches for `extract`: places, images, and no problems."""
    of = decoded_images
    array = still(of.images, of.transform, of.mode)
    for rows in batch_sampler:
        yield rows, torch.from_numpy(array[rows[0] : rows[-1] + 1].copy()), []


def tuning_loader(dataset: Any, batch_size: int = 0, batch_sampler: Any = None, **kwargs: Any) -> Iterator[Any]:
    """Batches for `finetune`: crops for its training, transformed images else."""
    if batch_sampler is None:
        part, count = dataset.part, len(dataset)
        split = {s for s, _ in part.rows}
        stacked = {s: still(part.splits[s], dataset.transform, dataset.mode) for s in split}
        for start in range(0, count, batch_size):
            rows = part.rows[start : start + batch_size]
            yield torch.from_numpy(np.stack([stacked[s][i] for s, i in rows])), None
        return
    transformed, seed = dataset.dataset, dataset.seed
    part, mode = transformed.part, transformed.mode
    raw = [
        decoded(("tune", s.fingerprint, mode), lambda index, s=s: pixels(s.read(index, mode)), len(s))
        for s in part.splits
    ]
    images = torch.from_numpy(np.stack([raw[s][i] for s, i in part.rows])).to(device())
    labels = part.labels().to(device())
    crop, flip, normalise = _parts(transformed.transform)
    for number, items in enumerate(batch_sampler):
        rows = torch.tensor(items) % len(images)
        generator = seeded(seed, number)
        taken = boxes(len(rows), crop.scale, crop.ratio, generator)
        x = crops(images[rows.to(device())], taken, crop.size[0]) / 255
        if flip:
            mirrored = torch.rand(len(x), 1, 1, 1, generator=generator, device=x.device) < flip
            x = torch.where(mirrored, x.flip(3), x)
        mean, std = (torch.as_tensor(v, device=x.device).view(1, -1, 1, 1) for v in (normalise.mean, normalise.std))
        yield (x - mean) / std, labels[rows.to(device())]


def _parts(transform: Any) -> tuple[Any, float, Any]:
    """Crop, probability of a mirror image and normalisation of a training transform that has nothing else."""
    by_name = {type(t).__name__: t for t in transform.transforms}
    flip = by_name.pop("RandomHorizontalFlip", SimpleNamespace(p=0.0)).p
    crop, normalise = by_name.pop("RandomResizedCropAndInterpolation"), by_name.pop("Normalize")
    # of strength 0, which does nothing
    if left := set(by_name) - {"MaybeToTensor", "ToTensor", "ColorJitter"}:
        raise ValueError(f"images in memory are cropped and mirrored, not {', '.join(left)}")
    return crop, flip, normalise


def start(where: Path, threads: int) -> None:
    """Make this process one that has its images in memory."""
    global folder
    folder = where
    torch.set_num_threads(threads)
    setup.data.TrainLoader, setup.data.val_loader = Training, validation  # type: ignore[misc,assignment]
    setup.data.check_images = lambda *datasets: None  # decoding finds what is unreadable
    extract.DataLoader = features_loader  # type: ignore[misc,assignment]
    fine_tuning.DataLoader = tuning_loader  # type: ignore[misc,assignment]
    if parent_process() is not None:
        threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End when the study has been ended: what trains saves first, what does anything else ends at once."""
    parent: Any = parent_process()
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
    with running:
        os._exit(128 + signal.SIGTERM)


def run(command: list[str], log: Path) -> int:
    """Run a `timm-etf` command, its output in a file; returns the exit status."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with running, log.open("a", encoding="utf-8") as file, redirect_stdout(file), redirect_stderr(file):
        sys.argv = ["timm-etf", *command]
        try:
            cli.main()
        except SystemExit as e:
            return e.code if isinstance(e.code, int) else 1
        except Exception:
            traceback.print_exc()
            return 1
    return 0


if __name__ == "__main__":  # python examples/study/in_memory.py DECODED VERB ...: as timm-etf VERB ...
    start(Path(sys.argv.pop(1)), torch.get_num_threads())
    cli.main()
