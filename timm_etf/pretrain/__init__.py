"""Pretraining with accelerate: `accelerate launch -m timm_etf.pretrain`, or `timm-etf pretrain` in one process."""
