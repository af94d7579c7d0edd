"""How well a backbone's features serve other data: extract them once, then probe, compare neighbours, fine-tune."""

from timm_etf.data.catalogue import Target
from timm_etf.data.images import find_targets, open_splits
from timm_etf.data.images import find_targets as resolve  # its earlier name
from timm_etf.features.extract import Features, extract, features_of, load
from timm_etf.transfer.few_shot import fewshot
from timm_etf.transfer.fine_tuning import finetune
from timm_etf.transfer.logistic import logistic_path
from timm_etf.transfer.neighbours import knn
from timm_etf.transfer.probe import linear_probe
from timm_etf.transfer.result import Result, paired_difference

__all__ = [
    "Features",
    "Result",
    "Target",
    "extract",
    "features_of",
    "fewshot",
    "find_targets",
    "finetune",
    "knn",
    "linear_probe",
    "load",
    "logistic_path",
    "open_splits",
    "paired_difference",
    "resolve",
]
