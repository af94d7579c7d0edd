"""torch's own tools that look for layers by their class."""

import copy

import pytest
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import timm_etf

CLIENT = "torch"
VERSION = torch.__version__


@pytest.mark.filterwarnings(
    "ignore:torch.ao.quantization is deprecated:DeprecationWarning",
    "ignore:torch.quantize_per_tensor, torch.quantize_per_channel and other:UserWarning",
)
def test_quantize_dynamic() -> None:
    """`quantize_dynamic(model, {nn.Linear})` leaves a fixed head in float, and quantises a freed one"""
    net = timm.create_model("test_vit_etf", num_classes=10).eval()
    images = torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        expected = net(images)
        for model, kind in ((net, timm_etf.FixedClassifier), (timm_etf.free_classifier(copy.deepcopy(net)), nn.Module)):
            quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
            assert type(quantised.head).__module__.startswith("torch.ao") == (kind is nn.Module)
            assert isinstance(quantised.head, kind)
            # eight bits in every other layer, too: nearly the same answer, whatever the weights happen to be
            assert torch.cosine_similarity(quantised(images), expected).min() > 0.95


def test_counted_operations() -> None:
    """`FlopCounterMode` counts the operations of a fixed head: as many as of the learned one"""
    counted = []
    for name in ("test_vit", "test_vit_etf"):
        net = timm.create_model(name, num_classes=10).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            net(torch.randn(1, 3, 160, 160))
        counted.append(counter.get_total_flops())
    assert counted[0] == counted[1] > 0
