"""Folders for the Hugging Face Hub: written by `export`, uploaded by `publish`, read by `create_model`."""

from timm_etf.hub.card import write_card
from timm_etf.hub.folder import export
from timm_etf.hub.load import create_model
from timm_etf.hub.publishing import gather, plan, publish

__all__ = ["create_model", "export", "gather", "plan", "publish", "write_card"]
