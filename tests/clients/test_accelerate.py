"""accelerate makes large models without memory and loads them piece by piece."""

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from timm_etf import UsageError, hub

accelerate = pytest.importorskip("accelerate")

CLIENT = "accelerate"
VERSION = accelerate.__version__


def loaded_into_empty(weights: nn.Module, folder: Path) -> nn.Module:
    save_file(weights.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    with accelerate.init_empty_weights(include_buffers=True):
        net = timm.create_model("test_resnet_etf", num_classes=10)
    return accelerate.load_checkpoint_and_dispatch(net, str(folder / "model.safetensors"), device_map={"": "cpu"})


def test_empty_weights(tmp_path: Path) -> None:
    """`init_empty_weights` and `load_checkpoint_and_dispatch`: the logits of the model that was saved, bit for bit"""
    net = timm.create_model("test_resnet_etf", num_classes=10).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(loaded_into_empty(net, tmp_path).eval()(images), net(images))


def test_a_learned_checkpoint(tmp_path: Path) -> None:
    """A learned checkpoint that was loaded so into an `_etf` model is refused at export"""
    net = loaded_into_empty(timm.create_model("test_resnet", num_classes=10), tmp_path)
    with pytest.raises(UsageError, match=r"fc\.weight is no simplex frame"):
        hub.export(net, tmp_path / "export")
    assert not (tmp_path / "export").exists()


def test_prepare_and_save_model(tmp_path: Path) -> None:
    """`Accelerator.prepare` and `save_model`: nothing of the head is trained, and the file loads in plain timm"""
    accelerator = accelerate.Accelerator(cpu=True)
    net = timm.create_model("test_resnet_etf", num_classes=10)
    net, optimizer = accelerator.prepare(net, torch.optim.AdamW(net.parameters(), lr=0.1, weight_decay=0.1))
    accelerator.backward(nn.functional.cross_entropy(net(torch.randn(4, 3, 64, 64)), torch.arange(4)))
    optimizer.step()
    accelerator.save_model(net, tmp_path)
    plain = timm.create_model("test_resnet", num_classes=10, checkpoint_path=str(tmp_path / "model.safetensors"))
    assert torch.equal(plain.fc.weight, timm.create_model("test_resnet_etf", num_classes=10).fc.weight)
    assert not plain.fc.bias.any()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(plain.eval()(images), net.eval()(images))
