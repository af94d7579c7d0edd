"""How well a backbone's features serve other data: extract them once, then probe, compare neighbours, fine-tune."""

from timm_etf.data.catalogue import Target
from timm_etf.transfer.features import Features, extract, features_of, load
from timm_etf.transfer.fewshot import fewshot
from timm_etf.transfer.finetune import finetune
from timm_etf.transfer.knn import knn
from timm_etf.transfer.logistic import logistic_path
from timm_etf.transfer.probe import linear_probe
from timm_etf.transfer.result import Result, paired_difference
from timm_etf.transfer.targets import open_splits, resolve

__all__ = [
    "Features",
    "Result",
    "Target",
    "extract",
    "features_of",
    "fewshot",
    "finetune",
    "knn",
    "linear_probe",
    "load",
    "logistic_path",
    "open_splits",
    "paired_difference",
    "resolve",
]
