"""`accelerate launch -m timm_etf.pretrain ...` is `accelerate launch -m timm_etf pretrain ...`."""

import sys

from timm_etf.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "pretrain")
    main()
