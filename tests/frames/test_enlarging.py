"""Vectors beside a frame: the old ones stay, the new ones are as far away as is stated."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from timm_etf import UsageError, frames


@given(st.integers(3, 30), st.data())
@settings(deadline=None, max_examples=30)
def test_an_orthoplex_goes_on_with_its_own_vertices(dim: int, data: st.DataObject) -> None:
    old = data.draw(st.integers(dim + 2, 2 * dim - 1)) if dim > 3 else 5
    count = data.draw(st.integers(1, 2 * dim - old))
    w = frames.orthoplex(old, dim, seed=3)
    torch.testing.assert_close(
        frames.enlarged(w, count), frames.orthoplex(old + count, dim, seed=3), atol=1e-12, rtol=0
    )


@given(st.integers(2, 20), st.integers(1, 20), st.integers(0, 10), st.integers(0, 2**31))
@settings(deadline=None, max_examples=30)
def test_beside_a_simplex_nothing_is_further_than_orthogonal(
    num_classes: int, count: int, more: int, seed: int
) -> None:
    dim = num_classes - 1 + max(1, count - 1) + more
    w = frames.simplex(num_classes, dim, seed=seed)
    if dim < num_classes <= 2 * dim - count:
        return  # two opposite vectors of a line are an orthoplex, too
    found = frames.enlarged(5 * w, count, seed=seed)
    torch.testing.assert_close(found[:num_classes], w)
    new = found[num_classes:]
    assert (new @ w.T).abs().max() < 1e-12  # old vectors that sum to zero: no vector has a negative cosine with all
    expected = (1 + 1 / max(1, count - 1)) * torch.eye(count, dtype=torch.float64) - 1 / max(1, count - 1)
    torch.testing.assert_close(new @ new.T, expected if count > 1 else torch.ones(1, 1, dtype=torch.float64))


@pytest.mark.parametrize(("num_classes", "dim", "count"), [(37, 9, 5), (37, 9, 37), (10, 9, 10), (18, 9, 9)])
def test_where_there_is_no_room_they_are_spread_by_descent(num_classes: int, dim: int, count: int) -> None:
    w = frames.make("auto", num_classes, dim)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    found = frames.enlarged(w.float(), count, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(found[:num_classes], w, atol=1e-6, rtol=0)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(num_classes + count, dtype=torch.float64))
    reached = frames.coherence(found)
    drawn = frames.coherence(torch.cat([w, frames.gaussian(count, dim, seed=1)]))
    assert frames.bound(num_classes + count, dim) <= reached < drawn - 0.05
    # No vector gains by a small step: each is where its nearest neighbours hold it.
    for i in range(num_classes, num_classes + count):
        others = torch.cat([found[:i], found[i + 1 :]])
        step = frames.gaussian(200, dim, seed=i) * 0.05
        moved = torch.nn.functional.normalize(found[i] + step, dim=1)
        assert (moved @ others.T).max(dim=1).values.min() > (found[i] @ others.T).max() - 0.02
    assert torch.equal(found, frames.enlarged(w.float(), count, seed=1))


def test_what_cannot_be_enlarged_is_refused() -> None:
    for frame, count, says in (
        (torch.eye(3), 0, "at least 1 vector, got 0"),
        (torch.eye(3)[0], 1, r"finite matrix \[K, d\]"),
        (torch.eye(3) * torch.nan, 1, "finite matrix"),
    ):
        with pytest.raises(UsageError, match=says):
            frames.enlarged(frame, count)
