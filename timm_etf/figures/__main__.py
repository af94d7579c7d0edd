"""Entry point of `torchrun -m timm_etf.figures geometry`: the processes share the features between them."""

from timm_etf.cli import main

if __name__ == "__main__":
    main()
