"""Frames that follow a tree: their Gram matrix, its limits, and trees that are none."""

import json
import logging
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from timm_etf import UsageError, frames
from timm_etf.frames import ClassTree

SEEDS = st.integers(0, 2**31)


@st.composite
def trees(draw: st.DrawFn) -> tuple[str, ...]:
    """Paths of 2 to 40 classes: chains, stars, and anything between, of unequal depths."""
    kind, count = draw(st.sampled_from(["chain", "star", "any", "deep"])), draw(st.integers(2, 40))
    if kind == "chain":  # each class hangs from the spine one step further down
        return tuple("/".join(["s"] * i + [f"c{i}"]) for i in range(count))
    if kind == "star":
        return tuple(f"c{i}" for i in range(count))
    most = 2 if kind == "any" else 7
    groups = st.lists(st.sampled_from("abc"), max_size=most).map(lambda parts: "/".join(parts))
    drawn = [draw(groups) for _ in range(count)]
    return tuple(f"{group}/c{i}".lstrip("/") for i, group in enumerate(drawn))


def heights(paths: tuple[str, ...]) -> np.ndarray:
    """Of lowest common ancestors, class by class."""
    ways = [p.split("/") for p in paths]
    d = np.zeros((len(ways), len(ways)))
    for i, a in enumerate(ways):
        for j, b in enumerate(ways):
            common = 0
            while common < min(len(a), len(b)) and a[common] == b[common]:
                common += 1
            below = [len(w) - common for w in ways if w[:common] == a[:common]]
            d[i, j] = 0 if i == j else max(below)
    return d


def expected_gram(e: np.ndarray) -> np.ndarray:
    """The formula as it is written, with an explicit inverse."""
    ones = np.ones(len(e))
    mu = 1 / (ones @ np.linalg.inv(e) @ ones - 1)
    return (1 + mu) * e - mu * np.outer(ones, ones)


def assert_gram(w: Tensor, gram: np.ndarray) -> None:
    assert np.abs((w @ w.T).numpy() - gram).max() < 1e-10


@given(trees(), st.floats(0.1, 200), st.integers(0, 20), SEEDS)
@settings(deadline=None, max_examples=60)
def test_cosines_are_those_of_the_tree(paths: tuple[str, ...], gamma: float, more: int, seed: int) -> None:
    tree = ClassTree(paths, gamma)
    d = heights(paths)
    assert np.array_equal(tree.distance.numpy(), d)
    w = tree.frame(len(paths) - 1 + more, seed)
    gram = expected_gram(np.exp(-gamma * d / d.max()))
    assert_gram(w, gram)
    assert np.abs(w.norm(dim=1).numpy() - 1).max() < 1e-12
    # It is of rank K-1, and any more of the offset would leave no frame at all.
    if gamma < 50:
        values = np.linalg.eigvalsh(gram)
        assert abs(values[0]) < 1e-9 < values[1]
        assert np.linalg.eigvalsh(gram - 0.01)[0] < -1e-6
    assert torch.equal(w, frames.hierarchy(tree.distance, w.shape[1], gamma=gamma, seed=seed))


@given(trees(), SEEDS)
@settings(deadline=None, max_examples=30)
def test_a_large_gamma_is_the_simplex(paths: tuple[str, ...], seed: int) -> None:
    k = len(paths)
    d = ClassTree(paths).distance
    for gamma, within in ((1e3 * float(d.max()), 1e-12), (1e300, 1e-12)):
        w = frames.hierarchy(d, k + 3, gamma=gamma, seed=seed)
        assert_gram(w, k / (k - 1) * (np.eye(k) - 1 / k))
        assert (w.sum(0).abs() < within * k).all()


@given(trees(), st.floats(0.1, 20), SEEDS, SEEDS)
@settings(deadline=None, max_examples=30)
def test_it_follows_the_order_of_the_classes(paths: tuple[str, ...], gamma: float, seed: int, shuffle: int) -> None:
    order = np.random.default_rng(shuffle).permutation(len(paths))
    w, other = ClassTree(paths, gamma).frame(40, seed), ClassTree(tuple(paths[i] for i in order), gamma).frame(40, seed)
    assert_gram(other, (w @ w.T).numpy()[np.ix_(order, order)])


@given(st.integers(2, 30), st.integers(2, 30), SEEDS)
@settings(deadline=None, max_examples=40)
def test_any_positive_definite_similarity(num_classes: int, attributes: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(num_classes, attributes, generator=g, dtype=torch.float64)
    e = x @ x.T + 0.1 * torch.eye(num_classes, dtype=torch.float64)
    w = frames.from_similarity(e, num_classes + 5, seed=seed)
    unit = (e / e.diagonal().sqrt() / e.diagonal().sqrt()[:, None]).numpy()
    assert_gram(w, expected_gram(unit))
    for offset in (3.0, 0.2):  # that all classes share: it is what the frame takes off
        assert_gram(
            frames.from_similarity(torch.from_numpy(unit) + offset, num_classes - 1, seed=seed), expected_gram(unit)
        )


def test_gradual_by_height_and_of_the_seed_only_the_rotation() -> None:
    tree = ClassTree(tuple(f"{i // 6}/{i // 2}/{i}" for i in range(60)))
    w = tree.frame(64, seed=1)
    cosines = {h: (w @ w.T)[tree.distance == h] for h in (1, 2, 3)}
    assert all(c.max() - c.min() < 1e-12 for c in cosines.values())
    assert [round(c.mean().item(), 2) for c in cosines.values()] == [0.32, 0.06, -0.03]
    other = tree.frame(64, seed=2)
    assert not torch.allclose(w, other)
    torch.testing.assert_close(w @ w.T, other @ other.T)
    with torch.device("meta"):
        assert torch.equal(tree.frame(64, seed=1), w)


@given(trees(), st.data())
@settings(deadline=None, max_examples=60)
def test_fewer_dimensions_keep_the_largest_part(paths: tuple[str, ...], data: st.DataObject) -> None:
    k = len(paths)
    if k < 5:
        return
    dim = data.draw(st.integers(2, k - 2))
    full = ClassTree(paths, 3.0).frame(k - 1)
    w = ClassTree(paths, 3.0).frame(dim)
    assert w.shape == (k, dim)
    assert np.abs(w.norm(dim=1).numpy() - 1).max() < 1e-12
    assert frames.coherence(w) < 1 - 1e-6  # no two classes are one
    # Eckart and Young: no other d directions hold more; scaled back, the frame holds exactly that much.
    values, vectors = np.linalg.eigh((full @ full.T).numpy())
    if values[-dim] - values[-dim - 1] > 1e-6:  # else it is some of the equal ones
        part = vectors[:, -dim:] * np.sqrt(values[-dim:])
        norms = np.linalg.norm(part, axis=1, keepdims=True)
        part /= np.maximum(norms, 1e-12)
        if norms.min() > 1e-5 and frames.coherence(torch.from_numpy(part)) < 1 - 1.1e-3:
            assert_gram(w, part @ part.T)


@given(trees(), st.integers(2, 12), SEEDS)
@settings(deadline=None, max_examples=40)
def test_which_of_equal_directions_stay_is_no_matter_of_rounding(paths: tuple[str, ...], dim: int, seed: int) -> None:
    if len(paths) < dim + 2:
        return
    w = ClassTree(paths, 3.0).frame(dim)
    gram = w @ w.T
    for gamma, other in ((3.0 * (1 + 1e-15), 0), (3.0 * (1 - 1e-14), 0), (3.0, seed)):
        again = ClassTree(paths, gamma).frame(dim, other)
        torch.testing.assert_close(again @ again.T, gram, rtol=0, atol=1e-6)


def test_a_frame_of_equal_directions_is_the_same_on_any_number_of_threads() -> None:
    tree, threads = ClassTree(tuple(f"{i // 10}/{i}" for i in range(200))), torch.get_num_threads()
    try:
        drawn = []
        for count in (1, 2):
            torch.set_num_threads(count)
            drawn.append(tree.frame(96))
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(*drawn, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("classes", "of_group", "dim"), [(300, 10, 25), (100, 5, 15), (990, 2, 96)])
def test_siblings_whose_groups_take_all_directions_are_told_apart(
    classes: int, of_group: int, dim: int, caplog: pytest.LogCaptureFixture
) -> None:
    tree = ClassTree(tuple(f"{i // of_group}/{i}" for i in range(classes)))
    with caplog.at_level(logging.WARNING):
        w = tree.frame(dim)
    assert "the rest is laid over them at random because classes would be one without it" in caplog.text
    assert frames.coherence(w) < 0.9
    full = tree.frame(classes - 1)
    for height in (1, 2):  # in the mean it is what the tree asks for
        near = tree.distance == height
        assert abs(((w @ w.T)[near].mean() - (full @ full.T)[near].mean()).item()) < 0.03
    apart = frames.nearest(w)
    assert frames.coherence(apart) < frames.coherence(w)
    assert ((apart @ apart.T)[tree.distance == 1].mean() > 0.08).item()


def test_what_fewer_dimensions_cost_is_said(caplog: pytest.LogCaptureFixture) -> None:
    tree = ClassTree(tuple(f"{i // 10}/{i}" for i in range(100)))
    with caplog.at_level(logging.WARNING):
        w = tree.frame(30)
    assert "100 classes in 30 dimensions" in caplog.text
    gram = (tree.frame(99) @ tree.frame(99).T).numpy()
    values = np.sort(np.linalg.eigvalsh(gram))[::-1]
    assert f"keeps {100 * values[:30].sum() / 100:.0f} %" in caplog.text
    assert f"changes by up to {np.abs((w @ w.T).numpy() - gram).max():.2f}" in caplog.text
    # Classes of a group stay nearer to each other than to the rest, as in no random code.
    near = tree.distance == 1
    assert (w @ w.T)[near].mean() > 0.4 > 0.0 > (w @ w.T)[tree.distance == 2].mean()
    assert frames.coherence(frames.hierarchy(1 - torch.eye(20), 12)) < 1 - 1e-3  # a star: no two classes become one
    caplog.clear()
    tree.frame(99)
    assert not caplog.text


TABLE = "poodle\tanimal/dog\nterrier\tanimal/dog\ncat\tanimal\n\nsaw\ttool\n"
GROUPS = {"poodle": "animal/dog", "terrier": "animal/dog", "cat": "animal", "saw": "tool"}
PARENTS = {"poodle": "dog", "terrier": "dog", "dog": "animal", "cat": "animal", "animal": None, "saw": "tool"}


def write(folder: Path, content: object) -> Path:
    if isinstance(content, str):
        (folder / "tree.tsv").write_text(content)
        return folder / "tree.tsv"
    (folder / "tree.json").write_text(json.dumps(content))
    return folder / "tree.json"


@pytest.mark.parametrize("kind", ["table", "groups", "parents", "folders"])
def test_a_tree_is_read_in_the_order_of_the_classes(tmp_path: Path, kind: str) -> None:
    if kind == "folders":
        for name, group in GROUPS.items():
            (tmp_path / group / name).mkdir(parents=True)
            (tmp_path / group / name / "0.png").touch()
        file = tmp_path
    else:
        file = write(tmp_path, {"table": TABLE, "groups": GROUPS, "parents": PARENTS}[kind])
    tree = ClassTree.read(file, ["cat", "poodle", "saw", "terrier"], gamma=2.0)
    assert tree.paths == ("animal/cat", "animal/dog/poodle", "tool/saw", "animal/dog/terrier")
    assert tree.distance.int().tolist() == [[0, 2, 3, 2], [2, 0, 3, 1], [3, 3, 0, 3], [2, 1, 3, 0]]
    record = json.loads(json.dumps(tree.record()))
    again = ClassTree(tuple(record["paths"]), record["gamma"])
    assert again == tree
    assert again.sha256 == record["sha256"] != ClassTree(tree.paths[::-1]).sha256
    assert ClassTree.read(file, ["saw", "cat"]).distance.tolist() == [[0, 2], [2, 0]]  # the other classes do not count


def test_a_class_may_be_the_group_of_another(tmp_path: Path) -> None:
    tree = ClassTree.read(write(tmp_path, PARENTS), ["dog", "poodle", "saw"])
    assert tree.paths == ("animal/dog", "animal/dog/poodle", "tool/saw")
    assert tree.distance.int().tolist() == [[0, 1, 3], [1, 0, 3], [3, 3, 0]]
    assert_gram(tree.frame(2), expected_gram(np.exp(-heights(tree.paths))))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"poodle": "dog"}, r"lacks 2 of 3 classes \(cat, saw\): add them"),
        ({**PARENTS, "animal": "dog"}, "has a cycle: '(dog|animal)' is above itself. Give it another parent"),
        ({"cat": "cat"}, "has a cycle: 'cat' is above itself"),
        (TABLE + "cat\ttool\n", "has the class 'cat' twice: leave one out"),
        ('{"cat": "a", "cat": "b"}', "has the class 'cat' twice"),
        ("cat animal\n", "has the line 'cat animal': write a class, a tab and its group"),
        ({"cat": ["a", "b"]}, "must give each class the text of its group"),
        ('{"cat": ', "Cannot read the class tree .* check the file"),
        ("[1, 2]", "Cannot read the class tree .* check the file"),
    ],
)
def test_a_tree_that_is_none_is_one_line(tmp_path: Path, content: object, says: str) -> None:
    file = write(tmp_path, content)
    if isinstance(content, str) and content[0] in "[{":
        file = file.rename(tmp_path / "tree.json")
    with pytest.raises(UsageError, match=says) as raised:
        ClassTree.read(file, ["cat", "poodle", "saw"])
    assert "\n" not in str(raised.value)


def test_folders_of_one_name_and_missing_files_are_refused(tmp_path: Path) -> None:
    for group in ("a", "b"):
        (tmp_path / group / "cat").mkdir(parents=True)
    with pytest.raises(UsageError, match="has the class 'cat' twice"):
        ClassTree.read(tmp_path, ["cat"])
    with pytest.raises(UsageError, match="Cannot read the class tree"):
        ClassTree.read(tmp_path / "nowhere.tsv", ["cat"])
    with pytest.raises(UsageError, match="'a/b' is in the tree twice"):
        ClassTree(("a/b", "a/c", "a/b"))
    for paths in ((), ("a",), (1, 2), ("a", "")):
        with pytest.raises(UsageError, match="two paths or more"):
            ClassTree(paths)  # type: ignore[arg-type]
    assert hash(ClassTree(["a", "b"])) == hash(ClassTree(("a", "b")))  # type: ignore[arg-type]


def test_a_table_may_begin_with_a_mark_and_have_spaces_and_doubled_slashes(tmp_path: Path) -> None:
    (tmp_path / "tree.tsv").write_text("\ufeffcat\tpet/ /cats \nd\u2028og\t/pet// dogs/\n", encoding="utf-8")
    assert ClassTree.read(tmp_path / "tree.tsv", ["cat", "d\u2028og"]).paths == ("pet/cats/cat", "pet/dogs/d\u2028og")
    (tmp_path / "deep.JSON").write_text("[" * 100_000)
    with pytest.raises(UsageError, match="Cannot read the class tree"):
        ClassTree.read(tmp_path / "deep.JSON", ["cat"])


@pytest.mark.parametrize(
    ("distance", "gamma", "says"),
    [
        (torch.zeros(3, 3), 3.0, "two classes are one"),
        (torch.ones(3, 3), 3.0, "0 from a class to itself"),
        (1 - torch.eye(3), 0.0, "gamma must be a positive number, got 0.0"),
        (1 - torch.eye(3), math.inf, "gamma must be a positive number, got inf"),
        (1 - torch.eye(3), 1e-300, "not positive definite .*gamma is too small"),
        (torch.tensor([[0.0, 1], [2, 0]]), 3.0, "symmetric: take the mean"),
        (torch.full((3, 3), math.nan), 3.0, "must be finite"),
        (torch.zeros(3, 4), 3.0, r"shape \[K, K\]"),
        (torch.zeros(1, 1), 3.0, "K >= 2"),
    ],
)
def test_what_is_no_distance_is_refused(distance: Tensor, gamma: float, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        frames.hierarchy(distance, 8, gamma=gamma)


def test_what_is_no_similarity_is_refused() -> None:
    with pytest.raises(UsageError, match=r"smallest eigenvalue -1\).* add something above 1 to its diagonal"):
        frames.from_similarity(torch.tensor([[1.0, 2.0], [2.0, 1.0]]), 8)
    frames.from_similarity(torch.tensor([[1.0, 2.0], [2.0, 1.0]]) + 1.01 * torch.eye(2), 8)
    with pytest.raises(UsageError, match="with itself must be positive"):
        frames.from_similarity(torch.zeros(3, 3), 8)
    with pytest.raises(UsageError, match="at least 1 dimension"):
        frames.from_similarity(torch.eye(3), 0)
