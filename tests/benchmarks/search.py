"""Who finds whom in 100,000 vectors: our blocked searches beside faiss's exact index, time and peak memory.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.search

with faiss-cpu installed. Each row is from a process of its own, in its CPU seconds; its memory is the peak over what it
held before, which is the vectors. faiss gives the five nearest; `neighbours.vote` lets them vote; `ranked`
needs the place of every image of the class among all 100,000, for the mean average precision.
"""

import re
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

GALLERY, QUERIES, WIDTH, CLASSES = 100_000, 10_000, 512, 1_000


def vectors() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gallery and queries of unit length with their labels, in clusters that overlap."""
    draw = torch.Generator().manual_seed(0)
    centres = torch.randn(CLASSES, WIDTH, generator=draw)
    found = []
    for count in (GALLERY, QUERIES):
        labels = torch.arange(count) % CLASSES
        x = torch.randn(count, WIDTH, generator=draw).mul_(3)
        for rows in torch.arange(count).split(10_000):
            x[rows] += centres[labels[rows]]
        found += [normalize(x, out=x), labels]
    return found[0], found[1], found[2], found[3]


def faiss_index(gallery: Tensor, y: Tensor, queries: Tensor, wanted: Tensor) -> float:
    """Recall@1 by faiss's exact index, which has a copy of the gallery."""
    import faiss

    index = faiss.IndexFlatIP(WIDTH)
    index.add(gallery.numpy())
    _, numbers = index.search(queries.numpy(), 5)
    return 100 * (y[torch.from_numpy(numbers[:, 0])] == wanted).double().mean().item()


def vote(gallery: Tensor, y: Tensor, queries: Tensor, wanted: Tensor) -> float:
    """Accuracy of the nearest neighbour, with the five nearest at hand."""
    from timm_etf.transfer import neighbours

    first, _ = neighbours.vote(gallery, y, queries, CLASSES, [(1, 1.0), (5, 1.0)])
    return 100 * (first == wanted).double().mean().item()


def ranked(gallery: Tensor, y: Tensor, queries: Tensor, wanted: Tensor) -> float:
    """Recall@1, beside recall@5 and mean average precision."""
    from timm_etf import retrieval

    return retrieval.ranked(gallery, y, queries, wanted)["recall@1"]


ROWS = {
    "faiss IndexFlatIP, 5 nearest": faiss_index,
    "transfer.neighbours.vote, 5 nearest": vote,
    "retrieval.ranked, whole ranking": ranked,
}


def memory(which: str) -> float:
    """MiB that this process holds (VmRSS) or has held at most (VmHWM)."""
    found = re.search(rf"^{which}:\s+(\d+)", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found
    return int(found[1]) / 1024


def measure(row: str) -> str:
    """A row of the table."""
    search, given = ROWS[row], vectors()
    search(*(x[:1000] for x in given))  # what is imported is not measured
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here on
    before, started = memory("VmRSS"), time.process_time()
    recall = search(*given)
    seconds = time.process_time() - started
    return f"| {row} | {seconds:.1f} | {memory('VmHWM') - before:.0f} | {recall:.2f} |"


def main() -> None:
    if sys.argv[1:]:
        print(measure(sys.argv[1]))
        return
    print("| search | CPU seconds | peak MiB beside the vectors | recall@1, % |")
    print("|---|---|---|---|", flush=True)
    for row in ROWS:
        subprocess.run([sys.executable, "-m", "tests.benchmarks.search", row], check=True)


if __name__ == "__main__":
    main()
