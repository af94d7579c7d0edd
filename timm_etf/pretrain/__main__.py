"""Entry point of `accelerate launch -m timm_etf.pretrain`."""

import tyro

from timm_etf.errors import one_line_errors
from timm_etf.pretrain.config import PretrainConfig


def main() -> None:
    """Parse the command line and train."""
    config = tyro.cli(PretrainConfig, prog="timm_etf.pretrain")
    with one_line_errors():
        from timm_etf.pretrain.loop import pretrain

        pretrain(config)


if __name__ == "__main__":
    main()
