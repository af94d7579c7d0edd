"""Reports of results that are made up: who is paired with whom, what fails, and what intervals cover."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from timm_etf.data.catalogue import Target
from timm_etf.features.candidates import Candidate
from timm_etf.report.results import Transfer, _problem
from timm_etf.transfer import Result
from timm_etf.transfer.plots import draw
from timm_etf.transfer.report import Report, show, summary

TARGETS = [Target("t", "x"), Target("u", "x")]


def made_up(
    members: dict[str, int],
    *,
    seeds: int = 1,
    targets: list[Target] = TARGETS,
    without: set[tuple[Any, ...]] = frozenset(),  # type: ignore[assignment]
    n: int = 400,
    **changes: Any,
) -> Report:
    """Random results of so many members of each label, without those of (label, member) or (label, member, target)."""
    rng = np.random.default_rng(0)
    places = [(label, i) for label, count in members.items() for i in range(count)]
    y = np.arange(n) % 3
    results = {}
    for number, (label, member) in enumerate(places):
        for target in targets:
            if (label, member) in without or (label, member, target.name) in without:
                continue
            for seed in range(seeds):
                correct = (rng.random(n) < 0.7).astype(np.float32)
                results[number, target.name, "probe", seed] = Result(correct, y, "unit length", {"strength": 1e5})
    candidates = [Candidate(label, f"{label}{i}") for label, i in places]
    fields = {"seconds": {}, "missing": {}, "notes": [], "collapse": {}, "weights_sha256": {}} | changes
    return Report(candidates, targets, results, settings={"seeds": seeds}, **fields)


def cells(text: str, name: str) -> list[str]:
    """The row of a table that begins with a name."""
    line = next(line for line in text.splitlines() if line.startswith((f"| {name} ", f"| **{name}")))
    return [c.strip() for c in line.strip("| ").split("|")]


@pytest.mark.parametrize(("ours", "theirs"), [(1, 3), (3, 1), (2, 3), (1, 2)])
@pytest.mark.parametrize("seeds", [1, 2, 3])
def test_numbers_of_models_that_differ_give_no_interval_over_runs(ours: int, theirs: int, seeds: int) -> None:
    report = made_up({"ref": theirs, "new": ours}, seeds=seeds)
    found = report.difference("new", TARGETS, "probe")
    assert (found.runs, found.runs_and_images, found.by_run, found.repeated) == (None, None, (), None)
    assert report.repetitions == f"nothing: {theirs} and {ours} models do not pair"
    assert "(-" not in cells(report.as_markdown(), "t")[-1]
    assert report.as_json()["protocols"]["probe"]["targets"]["t"]["differences"]["new"]["interval_over_runs"] is None


def test_pairs_are_decided_one_by_one() -> None:
    report = made_up({"ref": 3, "three": 3, "one": 1}, seeds=3)
    three, one = (report.difference(la, TARGETS, "probe") for la in ("three", "one"))
    assert (three.repeated, len(three.by_run), one.repeated) == ("trainings", 3, None)
    assert report.repetitions == (
        "3 models of each label, averaged over 3 seeds of the protocol (`three` - `ref`); "
        "nothing: 3 and 1 models do not pair (`one` - `ref`)"
    )
    # A repetition is a training: seeds of the protocol are averaged within it, members paired in order.
    by_hand = [
        np.mean([report.runs("three", t.name, "probe")[m][s].accuracy() for t in TARGETS for s in range(3)])
        - np.mean([report.runs("ref", t.name, "probe")[m][s].accuracy() for t in TARGETS for s in range(3)])
        for m in range(3)
    ]
    assert three.by_run == pytest.approx(by_hand)
    half = stats.t.ppf(0.975, 2) * stats.sem(by_hand)
    assert three.runs == pytest.approx((np.mean(by_hand) - half, np.mean(by_hand) + half))
    written = report.as_json()["protocols"]["probe"]["mean"]["differences"]
    assert [written[la]["runs_are"] for la in ("three", "one")] == ["trainings", None]


def test_one_model_each_pairs_the_seeds_of_the_protocol_and_claims_nothing() -> None:
    report = made_up({"ref": 1, "new": 1}, seeds=3)
    found = report.difference("new", TARGETS, "probe")
    assert (found.repeated, len(found.by_run), found.runs_and_images, found.claim) == ("protocol seeds", 3, None, None)
    assert found.runs is not None
    assert report.repetitions == "3 seeds of the protocol; the models themselves are one training each"
    text = report.as_markdown()
    assert "no pair has several trainings, so nothing is a claim" in text
    assert "over trainings and images |" not in text
    assert made_up({"ref": 1, "new": 1}).difference("new", TARGETS, "probe").runs is None


def test_the_third_interval_stands_in_the_report_where_there_are_trainings(tmp_path: Path) -> None:
    report = made_up({"ref": 3, "new": 3})
    found = report.difference("new", TARGETS, "probe")
    written = report.as_json()["protocols"]["probe"]["mean"]["differences"]["new"]
    assert written["interval_over_runs_and_images"] == list(found.runs_and_images)
    for end in (0, 1):  # the distances from the mean make a right-angled triangle
        legs = [interval[end] - found.mean for interval in (found.test_images, found.runs, found.runs_and_images)]
        assert math.hypot(*legs[:2]) == pytest.approx(abs(legs[2]))
    text = report.as_markdown()
    low, high = found.runs_and_images
    assert show(found).endswith(f"{{{low:+.1f} to {high:+.1f}}}")
    assert cells(text, "mean of 2")[-1] == show(found)
    assert "over 3 trainings: a look; a claim takes five" in text
    assert "over 5 trainings: enough for a claim" in made_up({"ref": 5, "new": 5}).as_markdown()
    tally = cells(text, "win / tie / loss over trainings and images")[-1]
    assert sum(map(int, tally.split(" / "))) == 2
    assert set(draw(report, tmp_path)) == {"transfer.png"}
    assert "new - ref: " in summary(report, tmp_path)


def test_a_training_that_failed_empties_its_own_column_only(tmp_path: Path) -> None:
    report = made_up({"a": 1, "b": 1, "c": 2}, without={("c", 1)})
    assert report.labels == ["a", "b", "c"]
    text = report.as_markdown()
    for name in ("t", "mean of 2"):
        a, b, c, b_less_a, c_less_a = cells(text, name)[2:]
        assert "-" not in (a, b, b_less_a)
        assert (c, c_less_a) == ("-", "-")
    mean = report.as_json()["protocols"]["probe"]["mean"]
    assert (mean["targets"], mean["accuracy"].keys(), mean["differences"].keys()) == (["t", "u"], {"a", "b"}, {"b"})
    alone = made_up({"a": 1, "b": 1})
    assert mean["differences"] == alone.as_json()["protocols"]["probe"]["mean"]["differences"]
    assert "b - a: " in summary(report, tmp_path)
    draw(report, tmp_path)


def test_a_target_that_failed_is_out_of_that_labels_mean_only() -> None:
    report = made_up({"a": 1, "b": 1, "c": 1}, without={("c", 0, "u")})
    a, b, c, b_less_a, c_less_a = cells(report.as_markdown(), "mean of 2")[2:]
    assert c.endswith("(of 1)")
    assert c_less_a.endswith("(of 1)")
    assert not any(cell.endswith(")") for cell in (a, b, b_less_a))
    mean = report.as_json()["protocols"]["probe"]["mean"]
    assert mean["targets_by_label"] == {"a": ["t", "u"], "b": ["t", "u"], "c": ["t"]}
    own = report.as_json()["protocols"]["probe"]["targets"]["t"]
    assert mean["differences"]["c"] == own["differences"]["c"]
    assert mean["accuracy"]["c"] == own["models"]["c"]["accuracy"]


def test_no_other_label_becomes_the_reference(tmp_path: Path) -> None:
    report = made_up({"a": 1, "b": 1, "c": 1}, without={("a", 0)})
    assert (report.reference, report.labels, report.others) == ("a", ["b", "c"], [])
    text = report.as_markdown()
    assert "The reference `a` has no result: there are no differences." in text
    assert "c - b" not in text
    written = report.as_json()
    assert written["reference"] is None
    assert "differences" not in written["protocols"]["probe"]["targets"]["t"]
    assert written["protocols"]["probe"]["mean"]["accuracy"].keys() == {"b", "c"}
    summary(report, tmp_path)
    draw(report, tmp_path)


def test_places_in_the_collapse_of_a_label_are_members() -> None:
    report = made_up({"a": 2}, collapse={(1, "t"): {"nc1": 1.0}})
    assert report.as_json()["collapse_of_train_features"]["a"] == {"t": [None, {"nc1": 1.0}], "u": []}
    assert "| a | 1 | - | - | - |" in report.as_markdown()


def test_what_is_written_is_what_is_read() -> None:
    for members in ({"a": 1}, {"a": 3, "b": 3, "c": 1}):
        assert _problem(json.loads(json.dumps(made_up(members, seeds=2).as_json())), Transfer) is None


def test_choices_at_the_end_of_a_grid_are_counted() -> None:
    report = made_up({"a": 1, "b": 1}, seeds=3)
    assert report.as_json()["protocols"]["probe"]["targets"]["t"]["models"]["a"]["at_grid_edge"] == {"strength": 3}
    assert "Chosen at an end of its grid: strength in 12 of 12 runs." in report.as_markdown()
    inside = Result(np.ones(2, np.float32), np.zeros(2, np.int64), "", {"k": 1, "temperature": 0.07})
    one = Report([Candidate("a", "a")], TARGETS[:1], {(0, "t", "knn", 0): inside}, {}, {}, [], {}, {}, {"seeds": 1})
    assert one.at_edge("a", "t", "knn") == {"k": 0, "temperature": 0}
    assert "Chosen at" not in one.as_markdown()


def test_a_picture_of_one_label_shows_the_interval_of_what_it_shows(tmp_path: Path) -> None:
    report = made_up({"a": 3}, seeds=2)
    low, high = report.interval("a", TARGETS[:1], "probe")
    rows = [r.correct for row in report.runs("a", "t", "probe") for r in row]
    value = report.accuracy("a", TARGETS[:1], "probe")
    assert value == pytest.approx(100 * np.mean(rows))
    # Six independent draws of 70 % are averaged on each of 400 images: that varies by a sixth of what one does.
    assert high - low == pytest.approx(2 * 1.96 * 100 * np.mean(rows, axis=0).std() / 20, rel=0.1)
    assert high - low < 0.6 * np.subtract(*report.runs("a", "t", "probe")[0][0].interval()[::-1])
    assert low < value < high
    assert set(draw(report, tmp_path)) == {"transfer.png"}


@pytest.mark.parametrize("trainings", [3, 5])
@pytest.mark.parametrize("spread", [0.0, 0.1, 0.5])
def test_the_third_interval_covers_equal_methods(trainings: int, spread: float) -> None:
    """Images differ in difficulty, trainings in skill on each target and on both; the methods are alike."""
    rng = np.random.default_rng(trainings)
    candidates = [Candidate(label, f"{label}{i}") for label in ("a", "b") for i in range(trainings)]
    n, repeats = 300, 200
    y = np.zeros(n, np.int64)
    covered = {"both": 0, "images": 0, "resampled": 0}
    for _ in range(repeats):
        skill = spread * rng.normal(size=(2 * trainings, 1))
        results = {}
        for target in TARGETS:
            logit = rng.normal(size=n) + skill + spread / 2 * rng.normal(size=(2 * trainings, 1))
            for number, right in enumerate(rng.random((2 * trainings, n)) < 1 / (1 + np.exp(-logit))):
                results[number, target.name, "probe", 0] = Result(right.astype(np.float32), y, "")
        found = Report(candidates, TARGETS, results, {}, {}, [], {}, {}, {"seeds": 1}).difference("b", TARGETS, "probe")
        covered["both"] += found.runs_and_images[0] <= 0 <= found.runs_and_images[1]
        covered["images"] += found.test_images[0] <= 0 <= found.test_images[1]
        picks = np.array(found.by_run)[rng.integers(0, trainings, (500, trainings))].mean(1)
        low, high = np.percentile(picks, [2.5, 97.5])
        covered["resampled"] += low <= 0 <= high
    share = {k: v / repeats for k, v in covered.items()}
    # Four standard errors of a share of 0.95 over the repeats are 0.062. Over 400 it was 0.97 to 0.99 for three
    # trainings, 0.96 to 0.99 for five: a little wide, as said.
    assert share["both"] >= 0.95 - 0.062, share
    assert share["resampled"] < 0.9, share  # what a percentile bootstrap over so few trainings would have given
    if spread:
        assert share["images"] < share["both"], share
    if spread == 0.5:
        assert share["images"] < 0.5, share
