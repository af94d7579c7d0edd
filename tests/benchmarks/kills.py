"""Kill a run at random moments until it has ended, and compare its weights with those of a run that was left alone.

    python tests/benchmarks/kills.py --kills 50
    python tests/benchmarks/kills.py --kills 10 --processes 2

Accumulation, an average of the weights, mixup, random erasing and loader workers are on. SIGKILL hits all processes at
once, somewhere between the start and a little after the next checkpoint: start-up, steps and saves alike.
"""

import argparse
import collections
import json
import random
import tempfile
import time
from pathlib import Path

from tests import commands
from tests.conftest import write_images
from tests.pretrain.runs import arguments, lines, weights

OPTIONS = "--workers 2 --grad-accum-steps 2 --model-ema --model-ema-decay 0.9 --mixup 0.2 --reprob 0.3 --clip-grad 1"
OPTIONS += " --checkpoint-steps 2 --drop-path 0.1"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=100, help="enough that the kills fit into the run")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    more = (*OPTIONS.split(), "--epochs", options.epochs, "--batch-size", 8 // options.processes)
    with tempfile.TemporaryDirectory() as folder:
        images, straight, out = (Path(folder) / name for name in ("images", "straight", "run"))
        write_images(images, "train", 24)
        write_images(images, "validation", 7)
        began = time.monotonic()
        _finish(options.processes, arguments(images, straight, *more))
        took = time.monotonic() - began
        print(f"the straight run took {took:.0f} s", flush=True)
        hits = kill(options, arguments(images, out, *more), out, longest=1.5 * took / options.epochs + 2)
        resume = ["--resume"] if (out / "run.json").exists() else []
        _finish(options.processes, arguments(images, out, *more, *resume))
        print(f"{options.kills} kills, {options.processes} processes: {dict(hits)}")
        ours, theirs = weights(out), weights(straight)
        same = all(ours[k].equal(theirs[k]) for k in theirs) and ours.keys() == theirs.keys()
        same &= [x["train_loss"] for x in lines(out)] == [x["train_loss"] for x in lines(straight)]
        print("weights and losses are the straight run's, to the bit" if same else "THE WEIGHTS OR LOSSES DIFFER")
    raise SystemExit(0 if same else 1)


def kill(
    options: argparse.Namespace, command: tuple[object, ...], out: Path, longest: float
) -> collections.Counter[str]:
    """Start or resume the run and kill it, `options.kills` times; counts what each kill hit."""
    moments = random.Random(options.seed)
    hits: collections.Counter[str] = collections.Counter()
    for number in range(options.kills):
        resume = ["--resume"] if (out / "run.json").exists() else []
        before = _newest(out)
        several = options.processes > 1
        running = (
            commands.start_ranks(options.processes, *command, *resume)
            if several
            else [commands.Command(*command, *resume)]
        )
        wait = moments.uniform(0, longest)
        deadline = time.monotonic() + wait
        while time.monotonic() < deadline and running[0].poll() is None:
            time.sleep(0.01)
        if running[0].poll() is not None:
            raise SystemExit(f"the run ended after {number} kills: more --epochs\n{running[0].stderr[-2000:]}")
        for rank in running:
            rank.kill()
        unfinished = list((out / "checkpoints").glob(".unfinished*"))
        what = "before run.json" if not (out / "run.json").exists() else "in a save" if unfinished else "in a step"
        hits[what if what != "in a step" or _newest(out) != before else "before a checkpoint"] += 1
        print(f"kill {number + 1} after {wait:.1f} s, {what}: newest checkpoint {_newest(out)}", flush=True)
    return hits


def _newest(out: Path) -> str:
    found = sorted((out / "checkpoints").glob("epoch-*"))
    for checkpoint in found:
        json.loads((checkpoint / "position.json").read_text())  # whole, or absent
    return found[-1].name if found else "none"


def _finish(processes: int, command: tuple[object, ...]) -> None:
    if processes == 1:
        commands.run(*command, check=True, timeout=600)
    else:
        commands.run_ranks(processes, *command, timeout=600)


if __name__ == "__main__":
    main()
