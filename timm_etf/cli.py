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


@app.command(name="models")
def models(pattern: tyro.conf.Positional[str] = "*", num_classes: int = 1000, compute: bool = False) -> None:
    """List what fits: width, frame, coherence and its bound, and what a fixed classifier saves.

    Args:
        pattern: Wildcard of timm names, such as 'resnet*'.
        num_classes: Number of classes K.
        compute: Compute the spherical codes that are not cached yet: seconds for each width, minutes beyond 20,000
            classes.
    """
    from timm_etf.models import coverage, left_out, table

    print(table(coverage(pattern, num_classes, compute=compute), num_classes))
    for name, reason in left_out(pattern).items():
        print(f"left out: {name}, {reason}")
    print(f"next: timm.create_model(NAME, num_classes={num_classes}) after import timm_etf")


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
