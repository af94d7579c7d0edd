"""Entry point of `accelerate launch -m timm_etf.pretrain`."""

import os

import tyro

from timm_etf.errors import one_line_errors
from timm_etf.pretrain.config import PretrainConfig


def main() -> None:
    """Parse the command line and train."""
    config = tyro.cli(PretrainConfig, prog="timm_etf.pretrain")
    with one_line_errors():
        from timm_etf.pretrain.loop import pretrain, summary

        results = pretrain(config)
        if os.environ.get("RANK", "0") == "0":
            print(summary(config, results))


if __name__ == "__main__":
    main()
