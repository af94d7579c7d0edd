import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score
from torchmetrics.retrieval import RetrievalHitRate, RetrievalMAP

from timm_etf import UsageError, retrieval
from timm_etf.retrieval import procrustes, ranked


def by_ranking(
    gallery: torch.Tensor, labels: torch.Tensor, queries: torch.Tensor, wanted: torch.Tensor
) -> dict[str, float]:
    """One query after the other, every image ranked; of equally near ones those of other classes first."""
    cosine = torch.nn.functional.normalize(queries) @ torch.nn.functional.normalize(gallery).T
    hits = []
    for similar, label in zip(cosine.numpy(), wanted.numpy(), strict=True):
        own = labels.numpy() == label
        if not own.any():
            continue
        ranking = own[np.lexsort((own, -similar))]
        hits.append([ranking[0], ranking[:5].any(), average_precision_score(own, similar)])
    return dict(zip(retrieval.METRICS, (100 * np.mean(hits, axis=0)).tolist(), strict=True)) | {"queries": len(hits)}


@given(
    classes=st.integers(2, 6),
    sizes=st.tuples(st.integers(1, 60), st.integers(1, 30)),
    ties=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_metrics_are_those_of_a_full_ranking(classes: int, sizes: tuple[int, int], ties: bool, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    gallery, queries = (torch.randn(n, 8, generator=draw, dtype=torch.float64) for n in sizes)
    labels, wanted = (torch.randint(classes, (n,), generator=draw) for n in sizes)
    if ties:  # vectors along axes: cosines of exactly -1, 0 and 1
        gallery, queries = (torch.eye(8, dtype=torch.float64)[x.abs().argmax(1)] for x in (gallery, queries))
    wanted[0] = labels[0]
    assert ranked(gallery, labels, queries, wanted) == pytest.approx(by_ranking(gallery, labels, queries, wanted))


def test_metrics_are_torchmetrics() -> None:
    """Which goes through the queries one by one, counts ties as they come and leaves out what has no positive score."""
    draw = torch.Generator().manual_seed(1)
    gallery, queries = (torch.randn(n, 8, generator=draw) for n in (90, 40))
    labels, wanted = (torch.randint(5, (n,), generator=draw) for n in (90, 40))
    wanted[:3] = 7  # of a class that the gallery lacks
    cosine = torch.nn.functional.normalize(queries) @ torch.nn.functional.normalize(gallery).T
    of_query = torch.arange(40)[:, None].expand_as(cosine).flatten()
    expected = {"queries": 37.0}
    for name, metric in (
        ("recall@1", RetrievalHitRate("skip", top_k=1)),
        ("recall@5", RetrievalHitRate("skip", top_k=5)),
        ("mAP", RetrievalMAP("skip")),
    ):
        metric.update(2 + cosine.flatten(), (wanted[:, None] == labels).flatten(), indexes=of_query)
        expected[name] = 100 * metric.compute().item()
    assert ranked(gallery, labels, queries, wanted) == pytest.approx(expected, abs=1e-3)


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = torch.Generator().manual_seed(0)
    gallery, queries = (torch.randn(n, 8, generator=draw, dtype=torch.float64) for n in (50, 40))
    labels, wanted = (torch.randint(3, (n,), generator=draw) for n in (50, 40))
    whole = ranked(gallery, labels, queries, wanted)
    blocks: list[int] = []
    in_order = retrieval._in_order
    monkeypatch.setattr(retrieval, "_in_order", lambda s: blocks.append(s.numel()) or in_order(s))
    for most in (200, 1):  # four queries at once; one, however many images there are
        blocks.clear()
        monkeypatch.setattr(retrieval, "_SIMILARITIES", most)
        assert ranked(gallery, labels, queries, wanted) == pytest.approx(whole)
        assert max(blocks) == max(most, 50)
        assert sum(blocks) == 50 * 40


def test_nothing_to_find_is_refused_and_all_alike_finds_nothing() -> None:
    x = torch.ones(4, 3)
    labels = torch.tensor([0, 0, 1, 1])
    with pytest.raises(UsageError, match="No query has an image of its class"):
        ranked(x, labels, x, labels + 2)
    assert ranked(x, labels, x, labels) == {"recall@1": 0, "recall@5": 100, "mAP": 50, "queries": 4}


@pytest.mark.parametrize(("dim", "other", "n"), [(6, 6, 40), (6, 9, 40), (9, 6, 40), (8, 8, 3)])
def test_procrustes_undoes_a_rotation(dim: int, other: int, n: int) -> None:
    draw = torch.Generator().manual_seed(0)
    inner = min(dim, other)
    x = torch.randn(n, inner, generator=draw, dtype=torch.float64)
    into = [torch.linalg.qr(torch.randn(d, inner, generator=draw, dtype=torch.float64)).Q.T for d in (dim, other)]
    found = procrustes(x @ into[0], x @ into[1])
    assert found.shape == (dim, other)
    assert torch.allclose(x @ into[0] @ found, x @ into[1], atol=1e-9)
    values = torch.linalg.svdvals(found)
    rank = min(inner, n)  # what the pairs do not determine is dropped
    assert torch.allclose(values, (torch.arange(len(values)) < rank).double(), atol=1e-9)
