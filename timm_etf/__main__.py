"""Entry point of `torchrun -m timm_etf VERB` and `accelerate launch -m timm_etf VERB`: processes share the work."""

from timm_etf.cli import main

if __name__ == "__main__":
    main()
