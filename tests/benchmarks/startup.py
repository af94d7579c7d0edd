"""Time to start, beside `import timm`: `python tests/benchmarks/startup.py [RUNS]`.

Each round starts fresh processes one after the other; medians over the rounds, and the ratio to `import timm`.
"""

import statistics
import subprocess
import sys
import time
from pathlib import Path

COMMAND = Path(sys.executable).with_name("timm-etf")
CASES = {
    "python -c 'import timm'": [sys.executable, "-c", "import timm"],
    "python -c 'import timm, timm_etf'": [sys.executable, "-c", "import timm, timm_etf"],
    "timm-etf --help": [COMMAND, "--help"],
    "timm-etf pretrain --help": [COMMAND, "pretrain", "--help"],
    "timm-etf models": [COMMAND, "models"],
}


def seconds(command: list[object]) -> float:
    started = time.perf_counter()
    subprocess.run([str(part) for part in command], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def main(rounds: int = 7) -> None:
    """Print the table."""
    times = [[seconds(command) for command in CASES.values()] for _ in range(rounds)]
    print("| command | seconds | beside import timm |\n|---|---|---|")
    for name, column in zip(CASES, zip(*times, strict=True), strict=True):
        ratio = statistics.median(own / row[0] for own, row in zip(column, times, strict=True))
        print(f"| `{name}` | {statistics.median(column):.2f} ({min(column):.2f} to {max(column):.2f}) | {ratio:.2f} |")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
