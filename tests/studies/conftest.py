from pathlib import Path

import pytest
import timm
import torch

from timm_etf import fix_classifier, hub


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exported models of random weights with the images' classes, and some that lack something."""
    root = tmp_path_factory.mktemp("exported")
    names = [f"class{k}" for k in range(5)]
    for number, name in enumerate(("plain", "fixed", "others", "damaged")):
        torch.manual_seed(number)
        net = timm.create_model("test_resnet", num_classes=5, pretrained_cfg_overlay={"input_size": (3, 32, 32)})
        if name == "fixed":
            fix_classifier(net)
        if name == "damaged":
            torch.nn.init.constant_(net.conv1[0].weight, float("nan"))
        hub.export(net, root / name, label_names=names[::-1] if name == "others" else names)
    return root
