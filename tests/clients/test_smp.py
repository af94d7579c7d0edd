"""segmentation-models-pytorch takes any of timm's models as the encoder of a segmentation model."""

import pytest
import timm
import torch

from timm_etf import UsageError

smp = pytest.importorskip("segmentation_models_pytorch")

CLIENT = "segmentation-models-pytorch"
VERSION = smp.__version__


def test_encoder_trains() -> None:
    """`smp.Unet("tu-resnet10t_etf", encoder_weights=None)` trains; nothing of the classifier is left in it"""
    net = smp.Unet("tu-resnet10t_etf", encoder_weights=None, classes=3)
    masks = net(torch.randn(2, 3, 32, 32))
    assert masks.shape == (2, 3, 32, 32)
    masks.square().mean().backward()
    assert all(p.grad is not None for p in net.parameters())
    assert not [name for name, _ in net.encoder.named_modules() if "fc" in name.split(".")]


def test_encoder_weights_are_the_published_ones() -> None:
    """`encoder_weights=True` takes the weights that are published for the name, bit for bit"""
    encoder = smp.Unet("tu-resnet10t_etf", encoder_weights=True).encoder.model.state_dict()
    published = timm.create_model("resnet10t_etf", pretrained=True).state_dict()
    assert encoder
    assert all(torch.equal(tensor, published[name]) for name, tensor in encoder.items())


def test_no_weights_are_one_line() -> None:
    """`encoder_weights=True` where none are published is one line that names the remedy"""
    with pytest.raises(UsageError, match="timm-etf pretrain --model resnet18_etf") as raised:
        smp.Unet("tu-resnet18_etf", encoder_weights=True)
    assert "\n" not in str(raised.value)
