"""What `import timm_etf` adds to `import timm`: `python tests/benchmarks/import_time.py [RUNS]`.

Each run is a fresh process that imports timm, then timm_etf, and times both; the median and the ratio are printed.
"""

import statistics
import subprocess
import sys

CODE = (
    "import time; a = time.perf_counter(); import timm; b = time.perf_counter(); import timm_etf; "
    "print(b - a, time.perf_counter() - b)"
)


def main(runs: int = 9) -> None:
    """Print the medians over `runs` processes."""
    times = [
        [float(t) for t in subprocess.check_output([sys.executable, "-c", CODE], text=True).split()]
        for _ in range(runs)
    ]
    timm, ours = (statistics.median(column) for column in zip(*times, strict=True))
    worst = max(t[1] for t in times)
    print(f"import timm {timm:.3f} s, then import timm_etf {ours:.3f} s (worst {worst:.3f}): {ours / timm:.1%} more")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
