"""Image backbones pretrained under a fixed (simplex ETF) classifier: a timm plugin.

Importing this package registers `<arch>_etf` for timm's architectures, so that
`timm.create_model("resnet50_etf", num_classes=100)` gives a ResNet-50 whose classifier is a frozen frame, and
`<resnet>_sw` with switchable whitening.
"""

import sys
from pathlib import PurePath
from typing import TYPE_CHECKING

__version__ = "0.1.0"

__all__ = [
    "FixedClassifier",
    "UsageError",
    "coverage",
    "create_model",
    "embed",
    "fix_classifier",
    "frames",
    "free_classifier",
    "grow_classifier",
]

if TYPE_CHECKING or PurePath(next(iter(sys.argv), "")).stem != "timm-etf":
    from timm_etf import frames
    from timm_etf import variants as variants
    from timm_etf.classifier import fix_classifier, free_classifier
    from timm_etf.coverage import coverage
    from timm_etf.embedding import embed
    from timm_etf.errors import UsageError
    from timm_etf.growing import grow_classifier
    from timm_etf.heads import FixedClassifier
    from timm_etf.hub.load import create_model

# Else this is the command: its help does not wait for timm, and the verbs import what they need (`cli.main`).
