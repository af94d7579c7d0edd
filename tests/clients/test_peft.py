"""peft adapts a backbone by a few trained weights, which it saves without the rest."""

from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import timm_etf

peft = pytest.importorskip("peft")

CLIENT = "peft"
VERSION = peft.__version__


def base(frame_seed: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_vit_etf", num_classes=10, frame_seed=frame_seed)


def trained(net: nn.Module, **config: object) -> nn.Module:
    """Adapted and trained for two steps, with decay."""
    torch.manual_seed(1)
    net = peft.get_peft_model(net, peft.LoraConfig(r=2, **config)).train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(2):
        nn.functional.cross_entropy(net(torch.randn(4, 3, 160, 160)), torch.arange(4)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return net.eval()


@pytest.mark.parametrize("target_modules", [["qkv"], "all-linear"], ids=str)
def test_lora(tmp_path: Path, target_modules: object) -> None:
    """LoRA on `["qkv"]` or `"all-linear"` leaves a fixed head alone; its logits last through save, merge and export"""
    net, images = trained(base(), target_modules=target_modules), torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        expected = net(images)
        assert not torch.allclose(expected, base().eval()(images))
        net.save_pretrained(tmp_path / "adapter")
        loaded = peft.PeftModel.from_pretrained(base(), tmp_path / "adapter").eval()
        assert torch.equal(loaded(images), expected)
        merged = loaded.merge_and_unload()
        assert torch.equal(merged.head.weight, base().head.weight)
        folder = timm_etf.hub.export(merged, tmp_path / "export")
        exported = timm_etf.create_model(f"local-dir:{folder}", pretrained=True).eval()
        assert isinstance(exported.head, timm_etf.FixedClassifier)
        torch.testing.assert_close(exported(images), expected, atol=1e-4, rtol=1e-4)


def test_modules_to_save(tmp_path: Path) -> None:
    """`modules_to_save=["head"]` trains nothing of a fixed head, and saves its frame beside the adapter"""
    net = trained(base(), target_modules=["qkv"], modules_to_save=["head"])
    assert all("lora_" in name for name, p in net.named_parameters() if p.requires_grad)
    net.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(base(frame_seed=4), tmp_path).eval()  # the adapter brings its own frame
    head = loaded.base_model.model.head.modules_to_save["default"]
    assert torch.equal(head.weight, base().head.weight)
    with torch.no_grad():
        images = torch.randn(2, 3, 160, 160)
        assert torch.equal(loaded(images), net(images))


def test_modules_to_save_of_a_freed_head() -> None:
    """After `timm_etf.free_classifier` `modules_to_save=["head"]` trains the head, from the frame on"""
    net = trained(timm_etf.free_classifier(base()), target_modules=["qkv"], modules_to_save=["head"])
    head = net.base_model.model.head
    assert torch.equal(head.original_module.weight, base().head.weight)
    assert not torch.equal(head.modules_to_save["default"].weight, base().head.weight)


def test_no_adapter_on_a_frame() -> None:
    """`target_modules` that name the fixed head are refused by peft"""
    with pytest.raises(ValueError, match=r"Target module FixedClassifier.* is not supported"):
        trained(base(), target_modules=["qkv", "head"])
