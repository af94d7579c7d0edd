"""Features of every image of a split, from any timm model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm.data
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from timm_etf.errors import UsageError


@dataclass(frozen=True)
class Features:
    """Features and labels of one split.

    Attributes:
        x: Pooled pre-logits features, float32 of shape [n, d].
        y: Class numbers, int64 of shape [n].
        class_to_idx: Class names and their numbers.
    """

    x: NDArray[np.float32]
    y: NDArray[np.int64]
    class_to_idx: dict[str, int]


@torch.inference_mode()
def extract(model: nn.Module, root: str | Path, split: str, *, batch_size: int = 256, workers: int = 2) -> Features:
    """Pooled pre-logits features (what the classifier would receive) of an image folder's split.

    Images go through the model's own evaluation transform, from its `pretrained_cfg`. Class numbers follow the sorted
    class names of this split; `linear_probe` refuses splits that disagree.

    Args:
        model: A timm model with pooled features; put into evaluation mode.
        root: Image folder with one folder per split.
        split: Name of the split.
        batch_size: Images per forward pass.
        workers: Loader processes.

    Returns:
        The features of all images, in the order of the folder.

    Raises:
        UsageError: If the split is missing or a feature is not finite.
    """
    folder = Path(root) / split
    if not folder.is_dir():
        raise UsageError(f"No folder {folder}: a target needs one folder for each of its splits.")
    data_config = timm.data.resolve_data_config(model=model)
    grey = data_config["input_size"][0] == 1
    dataset: Any = timm.data.create_dataset("", root=str(folder), input_img_mode="L" if grey else "RGB")
    dataset.transform = timm.data.create_transform(**data_config)
    loader: DataLoader[Any] = DataLoader(dataset, batch_size=batch_size, num_workers=workers)
    backbone: Any = model.eval()
    device = next(model.parameters()).device
    features, labels = [], []
    with tqdm(total=len(dataset), desc=f"{Path(root).name} {split}", unit="img", leave=False, disable=None) as bar:
        for images, targets in loader:
            pooled = backbone.forward_head(backbone.forward_features(images.to(device)), pre_logits=True)
            features.append(pooled.float().cpu())
            labels.append(targets)
            bar.update(len(targets))
    x = torch.cat(features).flatten(1).numpy()
    if not np.isfinite(x).all():
        raise UsageError(f"The model's features of {folder} are not finite: its weights are damaged or diverged.")
    return Features(x, torch.cat(labels).numpy(), dict(dataset.reader.class_to_idx))
