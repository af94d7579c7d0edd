"""transformers loads timm's models from folders and the Hub by classes of its own."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import timm_etf

transformers = pytest.importorskip("transformers")

CLIENT = "transformers"
VERSION = transformers.__version__


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `export` writes of the published model."""
    model = timm.create_model("resnet10t_etf", pretrained=True)
    return timm_etf.hub.export(model, tmp_path_factory.mktemp("transformers") / "export")


def test_logits_and_preprocessing(folder: Path) -> None:
    """`TimmWrapperForImageClassification`, `AutoImageProcessor`: timm's pixels and weights, its logits to rounding"""
    theirs = transformers.TimmWrapperForImageClassification.from_pretrained(folder).eval()
    plain = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 60, 3), dtype=np.uint8))
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=plain))
    pixels = transformers.AutoImageProcessor.from_pretrained(folder)(image, return_tensors="pt")["pixel_values"]
    assert torch.equal(pixels[0], transform(image))
    weights = theirs.timm_model.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in plain.state_dict().items())
    # Its tensors lie in the file as it is mapped, not aligned as torch's own: sums are taken in another order.
    with torch.no_grad():
        torch.testing.assert_close(theirs(pixel_values=pixels).logits, plain(pixels), atol=1e-5, rtol=1e-5)


def test_class_names(folder: Path) -> None:
    """`pipeline("image-classification")` answers with the class names"""
    names = timm_etf.published.config("resnet10t_etf.icons400")["label_names"]
    classify = transformers.pipeline("image-classification", model=str(folder))
    [best, *_] = classify(Image.new("RGB", (40, 40)))
    assert best["label"] in names
    assert list(classify.model.config.id2label.values()) == names


def test_way_back(folder: Path, tmp_path: Path) -> None:
    """What its `save_pretrained` writes `timm_etf.create_model` freezes again, with the same weights"""
    theirs = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    theirs.save_pretrained(tmp_path)
    ours = timm_etf.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert isinstance(ours.fc, timm_etf.FixedClassifier)
    weights = theirs.timm_model.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in ours.state_dict().items())


def test_variant_by_name(tmp_path: Path) -> None:
    """`TimmWrapperConfig(architecture="test_resnet_etf")` keeps its frame through training, saving and loading"""
    config = transformers.TimmWrapperConfig(architecture="test_resnet_etf", num_labels=10)
    model = transformers.TimmWrapperForImageClassification(config).train()
    frame = timm.create_model("test_resnet_etf", num_classes=10).fc.weight
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    model(pixel_values=torch.randn(4, 3, 64, 64), labels=torch.arange(4)).loss.backward()
    optimizer.step()
    model.save_pretrained(tmp_path)
    for net in (model, transformers.TimmWrapperForImageClassification.from_pretrained(tmp_path)):
        assert isinstance(net.timm_model.fc, timm_etf.FixedClassifier)
        assert torch.equal(net.timm_model.fc.weight, frame)
