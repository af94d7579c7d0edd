"""`accelerate launch -m timm_etf.pretrain ...` is `accelerate launch -m timm_etf pretrain ...`."""

import runpy
import sys

if __name__ == "__main__":
    sys.argv.insert(1, "pretrain")
    runpy.run_module("timm_etf", run_name="__main__")
