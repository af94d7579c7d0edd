"""Entry point of `accelerate launch -m timm_etf.pretrain`."""

import os
import sys

import tyro

from timm_etf.errors import one_line_errors
from timm_etf.pretrain.config import PretrainConfig


def main() -> None:
    """Parse the command line and train."""
    config = tyro.cli(PretrainConfig, prog="timm_etf.pretrain")
    if (
        os.environ.get("ACCELERATE_USE_CPU") == "True"
        and "MASTER_ADDR" in os.environ
        and "WORLD_SIZE" not in os.environ
    ):
        # accelerate sets the address for several processes, but starts one unless it is told of an MPI.
        print(
            "warning: accelerate launched a single process; several on the CPU need --mpirun_hostfile, or "
            "ACCELERATE_USE_CPU=true torchrun --nproc-per-node N -m timm_etf.pretrain ...",
            file=sys.stderr,
        )
    with one_line_errors():
        from timm_etf.pretrain.loop import pretrain, summary

        results = pretrain(config)
        if os.environ.get("RANK", "0") == "0":
            print(summary(config, results))


if __name__ == "__main__":
    main()
