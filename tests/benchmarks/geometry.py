"""Time and memory of the collapse metrics beside two straightforward ways, each in a process of its own.

Both loop over classes and invert d x d matrices by a dense pinv, in float32. `class covariances` holds them all,
K x d x d: 17 GB at 1,000 classes, so half as many are measured. `outer products` sums those of a class's samples,
n_k x d x d.

    python tests/benchmarks/geometry.py            # 50,000 samples of 2,048 features in 500 and in 1,000 classes
"""

import json
import resource
import subprocess
import sys
import time
from functools import partial

import torch

from timm_etf.geometry import ClassMoments, collapse

SHARED = ("nc1", "nc2_equinorm", "nc2_equiangularity", "cdnv", "vci", "within")


def straightforward(x: torch.Tensor, y: torch.Tensor, k: int, *, outer: bool) -> dict[str, float]:
    n, d = x.shape
    means = torch.stack([x[y == c].mean(0) for c in range(k)])
    covariances = torch.empty(1 if outer else k, d, d)
    s_w = torch.zeros(d, d)
    variance, share = torch.empty(k), torch.empty(k)
    for c in range(k):
        inside = x[y == c] - means[c]
        variance[c] = inside.square().sum(1).mean()
        share[c] = len(inside) / n
        if outer:
            s_w += (inside[:, :, None] @ inside[:, None, :]).sum(0) / n
        else:
            torch.mm(inside.T, inside, out=covariances[c]).div_(len(inside))
    if not outer:
        s_w = torch.tensordot(share, covariances, 1)
    centred = means - x.mean(0)
    s_b = (share[:, None] * centred).T @ centred
    rank = k - 1
    cut = 1e-5
    plain = means - means.mean(0)
    norms = plain.norm(dim=1)
    cosines, ratios = [], []
    for c in range(k):
        others = torch.arange(k) != c
        cosines.append((plain[others] @ plain[c]) / norms[others] / norms[c])
        ratios.append((variance[others] + variance[c]) / 2 / (means[others] - means[c]).square().sum(1))
    return {
        "nc1": float((s_w @ torch.linalg.pinv(s_b, rtol=cut, hermitian=False)).trace() / k),
        "nc2_equinorm": float(norms.std(correction=0) / norms.mean()),
        "nc2_equiangularity": float(torch.cat(cosines).std(correction=0)),
        "cdnv": float(torch.cat(ratios).mean()),
        "vci": float(1 - (torch.linalg.pinv(s_w + s_b, rtol=cut) @ s_b).trace() / rank),
        "within": float(s_w.trace() / d),
    }


def one_pass(x: torch.Tensor, y: torch.Tensor, k: int) -> dict[str, float]:
    return collapse(ClassMoments.of(x, y, k))


WAYS = {
    "one pass": one_pass,
    "class covariances": partial(straightforward, outer=False),
    "outer products": partial(straightforward, outer=True),
}


def measure(way: str, n: int, k: int, d: int) -> None:
    """In the process that this is about: print seconds, peak memory beyond the data in MiB, and the numbers."""
    torch.manual_seed(0)
    y = torch.arange(n) % k
    x = torch.randn(n, d)
    for c, centre in enumerate(torch.randn(k, d)):  # one by one: a copy would raise the peak before the measurement
        x[c::k] += centre
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    found = WAYS[way](x, y, k)
    seconds = time.perf_counter() - started
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(json.dumps({"seconds": seconds, "MiB": peak, "numbers": {m: found[m] for m in SHARED}}))


def main() -> None:
    for k, other in ((500, "class covariances"), (1000, "outer products")):
        results = {}
        for way in ("one pass", other):
            command = [sys.executable, __file__, "50000", str(k), "2048", way]
            results[way] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            found = results[way]
            print(f"{k} classes, {way:18}{found['seconds']:8.1f} s {found['MiB']:8.0f} MiB beyond the features")
        a, b = results.values()
        print(f"ratio{b['seconds'] / a['seconds']:34.1f}   {b['MiB'] / a['MiB']:8.1f}")
        for metric in SHARED:
            print(f"  {metric:20}{a['numbers'][metric]:12.6f}{b['numbers'][metric]:12.6f}")


if __name__ == "__main__":
    if len(sys.argv) > 4:
        measure(sys.argv[4], *map(int, sys.argv[1:4]))
    else:
        main()
