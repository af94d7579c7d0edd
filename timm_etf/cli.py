"""`timm-etf VERB`: one thin function per verb, and nothing heavy imported before it is known."""

from pathlib import Path

import tyro

from timm_etf.errors import one_line_errors
from timm_etf.pretrain.config import PretrainConfig

app = tyro.extras.SubcommandApp()


@app.command(name="pretrain")
def pretrain(config: tyro.conf.OmitArgPrefixes[PretrainConfig]) -> None:
    """Pretrain a timm architecture with a fixed or a learned classifier (one process; see also accelerate launch)."""
    from timm_etf.pretrain.loop import pretrain, summary

    print(summary(config, pretrain(config)))


@app.command(name="demo")
def demo(out: Path, resume: bool = False) -> None:
    """The five-minute demo: pretrain a small backbone twice (learned and fixed head), probe both, export both.

    Args:
        out: Folder for everything the demo makes, new or empty.
        resume: Continue a demo that was stopped.
    """
    from timm_etf.demo import run

    run(out, resume=resume)


@app.command(name="data")
def data(root: Path) -> None:
    """Build the embedded pictograms and the demo's transfer targets as image folders.

    Args:
        root: Folder that receives one folder per data set.
    """
    from timm_etf.data import build_pictograms, build_targets

    for folder in (build_pictograms(root), *build_targets(root).values()):
        print(folder)


def main() -> None:
    """Entry point of the `timm-etf` command."""
    with one_line_errors():
        app.cli(prog="timm-etf", description="Image backbones pretrained under a fixed classifier.")
