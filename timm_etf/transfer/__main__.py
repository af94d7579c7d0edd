"""Entry point of `accelerate launch -m timm_etf.transfer`: the processes share features and jobs between them."""

import sys

from timm_etf.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "transfer")
    main()
