"""Lightning trains a module in a loop of its own, and keeps its checkpoints."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

from timm_etf import frames

L = pytest.importorskip("lightning")
EMAWeightAveraging = pytest.importorskip("lightning.pytorch.callbacks").EMAWeightAveraging

CLIENT = "lightning"
VERSION = L.__version__

pytestmark = pytest.mark.filterwarnings(
    "ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning",
    "ignore:The 'train_dataloader' does not have many workers",
)


class Classifier(L.LightningModule):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = timm.create_model(name, num_classes=5)

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=0.1)


def fit(folder: Path, epochs: int, *callbacks: Any, resume: Path | None = None) -> Any:
    torch.manual_seed(0)
    data = torch.utils.data.TensorDataset(torch.randn(8, 3, 32, 32), torch.arange(8) % 5)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_epochs=epochs, default_root_dir=folder, callbacks=list(callbacks), **quiet
    )
    net = Classifier("resnet10t_etf")
    trainer.fit(net, torch.utils.data.DataLoader(data, batch_size=4), ckpt_path=resume)
    trainer.save_checkpoint(folder / "last.ckpt")
    return net.eval()


def test_fit_and_checkpoint(tmp_path: Path) -> None:
    """`Trainer.fit` trains the backbone and not the frame; `load_from_checkpoint` gives the same logits, bit for bit"""
    net = fit(tmp_path, 1)
    fresh = timm.create_model("resnet10t_etf", num_classes=5)
    assert torch.equal(net.net.fc.weight, fresh.fc.weight)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["state_dict"].keys() == {f"net.{name}" for name in fresh.state_dict()}
    assert len(saved["optimizer_states"][0]["state"]) == len(list(fresh.parameters()))
    loaded = Classifier.load_from_checkpoint(tmp_path / "last.ckpt").eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded.net(images), net.net(images))


def test_resume(tmp_path: Path) -> None:
    """A run that goes on from a checkpoint ends with the weights of the run that was left alone"""
    whole = fit(tmp_path / "whole", 2)
    fit(tmp_path / "half", 1)
    rest = fit(tmp_path / "rest", 2, resume=tmp_path / "half" / "last.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), rest.state_dict().values(), strict=True))


def test_averages(tmp_path: Path) -> None:
    """`EMAWeightAveraging` rounds the frame, in its last bits; the average still loads as one"""
    net = fit(tmp_path, 2, EMAWeightAveraging(decay=0.9))
    assert frames.is_simplex(net.net.fc.weight, 1e-5)
    timm.create_model("resnet10t_etf", num_classes=5).load_state_dict(net.net.state_dict())
