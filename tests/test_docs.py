"""What README, docs/ and the examples say is so: numbers are those of the files they name, commands and code run."""

import argparse
import functools
import inspect
import json
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import tyro

import timm_etf
from tests import commands
from tests.clients import works_with
from tests.hub.conftest import Client
from tests.hub.conftest import client as client
from tests.hub.conftest import server as server
from tests.hub.loopback import Hub
from timm_etf import cli, hub, published
from timm_etf.coverage import left_out
from timm_etf.pretrain.recipe import with_recipe
from timm_etf.report.statistics import in_quadrature, t_interval

ROOT = Path(__file__).parents[1]
README, RESULTS, HEADS = (ROOT / name for name in ("README.md", "docs/results.md", "docs/heads.md"))
PAGES = [README, *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "examples").glob("*/README.md"))]


def name_of(page: object) -> str:
    return str(page.relative_to(ROOT)) if isinstance(page, Path) else ""


def text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(language: str, page: Path) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text(page), re.DOTALL)


def results(name: str) -> Any:
    return json.loads((ROOT / "examples" / name / "results.json").read_text(encoding="utf-8"))


def rows(page: Path, *first_cells: str) -> Iterator[list[str]]:
    """Cells of a page's table rows that begin with these."""
    for first in first_cells:
        found = re.search(rf"^\| {re.escape(first)}[^|]*\|(.*)\|$", text(page), re.MULTILINE)
        assert found, first
        yield [cell.strip() for cell in found[1].split("|")]


def signed(mean: float, interval: list[float] | None) -> str:
    return f"{mean:+.1f}" + (f" ({interval[0]:+.1f} to {interval[1]:+.1f})" if interval else "")


def words(page: Path) -> str:
    """A page on one line, for sentences that are broken."""
    return " ".join(text(page).split())


# Numbers


def intervals() -> dict[str, dict[str, str]]:
    """Mean and t interval over trainings of the geometry's metrics, as they are shown, by metric and label."""
    found = results("geometry")["geometry"]["icons-400"]["train"]
    shown: dict[str, dict[str, str]] = {}
    for label, trainings in found.items():
        for metric in trainings[0]:
            values = [training[metric] for training in trainings]
            low, high = t_interval(values)  # type: ignore[misc]
            shown.setdefault(metric, {})[label] = f"{np.mean(values):.3g} ({low:.3g} to {high:.3g})"
    return shown


def said(page: Path) -> list[str]:
    """The decimal numbers of a page, without those of code, links and papers, and of benchmarks that keep no file."""
    sections = re.split(r"^(?=## )", text(page), flags=re.MULTILINE)
    kept = [s for s in sections if "(`python tests/benchmarks/" not in s or "benchmarks/results/" in s]
    plain = re.sub(r"```.*?```|`[^`]*`|\]\([^)]*\)|arXiv [\d.]+", "", "".join(kept), flags=re.DOTALL)
    return re.findall(r"(?<![\w.,])\d[\d,]*\.\d+(?![\w.]*\d)", plain)


def numbers_in(value: Any) -> Iterator[float]:
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from numbers_in(part)
    elif isinstance(value, int | float):
        yield abs(value)


def known_to(page: Path) -> set[str]:
    """Every number of the result files that a page links to, as it may be written."""
    cells = [cell for by_label in intervals().values() for cell in by_label.values()]
    known = {number for cell in cells for number in re.findall(r"\d[\d.]*", cell)}
    known |= {f"{weights.stat().st_size / 1e6:.1f}" for weights in ROOT.glob("timm_etf/published/*/*.safetensors")}
    for path in re.findall(r"\]\(([^)#:]+\.(?:json|txt|md))\)", text(page)):
        file = (page.parent / path).resolve()
        if file.name == "README.md" and (beside := file.with_name("results.json")).exists():
            file = beside
        if file.suffix == ".json":
            for value in numbers_in(json.loads(file.read_text(encoding="utf-8"))):
                known |= {f"{v:.{digits}f}" for v in (value, 100 * value) for digits in (1, 2, 3, 4)} | {f"{value:.3g}"}
        elif file.suffix == ".txt" or file.name == "report.md":
            known |= set(re.findall(r"\d[\d,]*\.\d+", file.read_text(encoding="utf-8")))
    return known


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_number_is_in_a_file_that_the_page_names(page: Path) -> None:
    known = known_to(page)
    assert [number for number in said(page) if number not in known] == []


def test_transfer() -> None:
    found = results("transfer")["protocols"]
    means = [found[p]["mean"] for p in ("probe", "knn", "1-shot", "5-shot", "10-shot")]
    learned, etf, sw = rows(RESULTS, "learned, accuracy in %", "ETF less learned", "switchable whitening less learned")
    assert learned == [f"{m['accuracy']['learned']:.1f}" for m in means]
    differences = {la: [m["differences"][la] for m in means] for la in ("etf", "sw")}
    shown = {la: [signed(d["mean"], d["interval_over_runs"]) for d in ds] for la, ds in differences.items()}
    assert (etf, sw) == (shown["etf"], shown["sw"])
    probe, knn, one_shot, *_ = shown["etf"]
    assert f"| a learned classifier | {knn} | {one_shot} | {probe} |" in words(README)
    example = words(ROOT / "examples" / "transfer" / "README.md")
    assert f"{probe[:-1]} over trainings)" in example.replace("points under a linear probe ", "")
    assert f"Whitening: {shown['sw'][0]}" in example


def test_what_is_said_of_the_means_over_trainings_and_images() -> None:
    excluded = []
    for protocol, found in results("transfer")["protocols"].items():
        d = found["mean"]["differences"]["etf"]
        low, high = in_quadrature(d["mean"], d["interval_over_runs"], d["interval_over_test_images"])
        excluded += [protocol] if high < 0 or low > 0 else []
    assert excluded == ["1-shot", "5-shot"]  # and the text says that the interval of 10 images includes 0


def test_geometry() -> None:
    found = intervals()
    names = {"NC1": "nc1", "CDNV": "cdnv", "VCI": "vci", "NC2": "nc2_equiangularity", "NC3": "nc3", "NC4": "nc4"}
    names |= {"norm of a feature": "feature_norm", "tr C / D": "within", "tr C / total": "within_share"}
    for cells, metric in zip(rows(RESULTS, *names), names.values(), strict=True):
        assert cells == [found[metric][label] for label in ("learned", "etf", "sw")], metric
    share = [float(found["within_share"][la].split()[0]) for la in ("learned", "etf")]
    assert 0 < 1 - share[1] / share[0] < 1 / 50
    assert "by less than one part in fifty" in words(RESULTS)


def test_random_features() -> None:
    points = [
        p
        for models in results("random_features")["random_features"].values()
        for trainings in models.values()
        for training in trainings
        for p in training
    ]
    inside = sum(p["band"][0] <= p["theory"] <= p["band"][1] for p in points)
    for page in (RESULTS, ROOT / "examples" / "random_features" / "README.md"):
        assert f"at {inside} of {len(points)} points" in words(page)


def test_demo() -> None:
    found = results("demo")
    top1 = {head: np.mean([run["top1"] for run in found["source"][head]]) for head in ("learned", "ETF")}
    names = ["source: pictograms", "probe: pictograms", "probe: Greek", "probe: Cyrillic", "probe: MNIST"]
    source, *targets = rows(RESULTS, *names)
    apart = found["source_difference"]
    assert source == [*(f"{a:.1f}" for a in top1.values()), signed(apart["mean"], apart["interval_over_runs"])]
    measured = found["transfer"]["protocols"]["probe"]["targets"]
    for cells, target in zip(targets, measured.values(), strict=True):
        d = target["differences"]["ETF"]
        both = [f"{target['models'][head]['accuracy']:.1f}" for head in ("learned", "ETF")]
        assert cells == [*both, signed(d["mean"], d["interval_over_runs_and_images"])]


def test_what_fits() -> None:
    for num_classes in (10, 100, 1000, 21843):
        counts = [0, 0, 0, 0]
        for row in timm_etf.coverage("*", num_classes):
            kinds = set(row.frames)
            counts[3 if len(kinds) > 1 else ("simplex", "orthoplex", "spherical_code").index(*kinds)] += 1
        assert next(rows(HEADS, f"{num_classes:,} ")) == [str(count) for count in counts]
    names = sum(counts) + len(left_out())
    assert f"timm {timm.__version__}'s {names:,} architectures {sum(counts):,} have a variant" in words(HEADS)


def test_narrow_heads() -> None:
    found = {name: f"{source['top1']:.1f}" for name, source in results("narrow_heads").items()}
    assert f"({found['128-orthoplex']} against {found['128-learned']} % top-1)" in words(HEADS)
    code, gaussian, learned = (found[f"64-{k}"] for k in ("spherical_code", "gaussian", "learned"))
    assert f"64 features: {code} spherical code, {gaussian} Gaussian, {learned} learned)" in words(HEADS)
    assert f"gave them back ({found['64-simplex-behind-mlp']})" in words(HEADS)


@pytest.mark.parametrize("page", [ROOT / "docs" / "publishing.md", ROOT / "examples" / "finetune" / "README.md"])
def test_fine_tuning(page: Path) -> None:
    greek, mnist = results("finetune").values()
    for cells, target in zip(rows(page, "Greek letters in unseen", "MNIST, 20"), (greek, mnist), strict=True):
        runs = [run["accuracy"] for run in target.values()]
        assert cells == [f"{np.mean(r):.1f} % ({', '.join(f'{a:.1f}' for a in r)})" for r in runs]


@pytest.mark.parametrize("output", sorted((ROOT / "tests" / "benchmarks" / "results").glob("*.txt")), ids=name_of)
def test_benchmarks_are_what_their_commands_printed(output: Path) -> None:
    page = text(ROOT / "docs" / "benchmarks.md")
    command, *lines = output.read_text(encoding="utf-8").splitlines()
    assert f"`{command.removeprefix('$ ')}`" in " ".join(page.split())
    for part in "\n".join(lines).split("\n\n"):
        assert "\n".join(line for line in part.splitlines() if line.startswith("|")) in page


@pytest.mark.parametrize("name", published.NAMES)
def test_published(name: str) -> None:
    card = json.loads((ROOT / "hub_cards" / name / "results.json").read_text(encoding="utf-8"))
    twin = results("icons400").get(name.partition("_etf")[0])
    top1 = f"{card['source']['top1']:.1f} %" + (f" ({twin['top1']:.1f} %)" if twin else "")
    for page in (README, ROOT / "docs" / "publishing.md"):
        (cells,) = rows(page, f"[{name}]")
        data = published.config(name)["etf"]["data"]
        assert cells[0].startswith(f"{data['images']:,} icons of {published.config(name)['num_classes']} names, ")
        assert cells[1] == top1
        megabytes = Path(published.__file__).with_name(name).joinpath("model.safetensors").stat().st_size / 1e6
        assert cells[2].startswith(f"{megabytes:.1f} MB float16")


def test_works_with_names_the_tests_that_are_there() -> None:
    page, tests = text(works_with.PAGE), list(works_with.there())
    assert works_with.said(page) == tests
    assert all(tested for _, tested in tests)
    results = dict.fromkeys(tests, True)
    again = works_with.written(page, dict.fromkeys(dict(tests), "1.2.3"), results | {tests[0]: False})
    assert works_with.said(again) == tests
    assert again.count("**fails**") == 1
    assert works_with.missing(results) == []
    assert works_with.missing([test for test in tests if test[0] != "peft"]) == ["peft"]


# Links, commands and code


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for path in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text(page)):
        assert (page.parent / path).exists(), path


def command_lines(*wanted: str) -> list[str]:
    """The different lines of all bash blocks that have one of these words."""
    lines = [line for page in PAGES for line in "\n".join(blocks("bash", page)).replace("\\\n", " ").splitlines()]
    parts = [part.strip() for line in lines for part in line.partition("  #")[0].split(" && ")]
    return [part for part in dict.fromkeys(parts) if any(word in part for word in wanted)]


@pytest.mark.parametrize("line", command_lines("timm-etf ", "timm_etf.pretrain"))
def test_commands_have_the_options_that_are_given(line: str) -> None:
    given = shlex.split(line)
    at = next(i for i, word in enumerate(given) if word.endswith(("timm-etf", "timm_etf.pretrain")))
    verb, *arguments = ("pretrain", *given[at + 1 :]) if given[at] == "timm_etf.pretrain" else given[at + 1 :]
    settings = cli._settings(verb)
    if inspect.isfunction(settings):  # which tyro would call
        settings = functools.wraps(settings)(lambda *args, **kwargs: None)
    parsed = tyro.cli(settings, args=with_recipe(arguments) if verb == "pretrain" else arguments)
    if verb == "pretrain":
        parsed.check()  # what is given goes together, too


class Parsed(Exception):
    """What is given was understood; nothing is done."""


def only(parse: Callable[..., Any]) -> Callable[..., None]:
    def parsed(*args: Any, **kwargs: Any) -> None:
        parse(*args, **kwargs)
        raise Parsed

    return parsed


@pytest.mark.parametrize("line", command_lines("python examples/"))
def test_scripts_have_the_options_that_are_given(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    script, *arguments = shlex.split(line)[1:]
    code = text(ROOT / script)
    for package in re.findall(r"^(?:import|from) (faiss|pytorch_ood)", code, re.MULTILINE):
        pytest.importorskip(package)  # of the extra clients
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    monkeypatch.syspath_prepend(ROOT / Path(script).parent)
    for parser, name in ((argparse.ArgumentParser, "parse_args"), (tyro, "cli")):
        monkeypatch.setattr(parser, name, only(getattr(parser, name)))
    takes_options = re.search(r"parse_args|tyro\.cli", code)
    with pytest.raises(Parsed if takes_options else FileNotFoundError):  # the one without looks into its folder
        runpy.run_path(str(ROOT / script), run_name="__main__")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    """A folder with what is on no machine: images of one's own, an exported model."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "IMAGES").symlink_to(images / "validation")
    (folder / "examples").symlink_to(ROOT / "examples")
    model = timm.create_model("resnet10t_etf", pretrained=True)
    hub.export(model, folder / "export", label_names=list(model.pretrained_cfg["label_names"]))
    return folder


@pytest.mark.parametrize(
    ("page", "code"), [(page, code) for page in PAGES for code in blocks("python", page)], ids=name_of
)
def test_code_runs(page: Path, code: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    code = re.sub(r'"(hf-hub|local-dir):[^"]*"', repr(f"local-dir:{place / 'export'}"), code)
    code = code.replace('timm.create_model("resnet50", pretrained=True)', 'timm.create_model("resnet50")')
    code = re.sub(r"_in1k(.), pretrained=True", r"_in1k\1", code)
    exec(code, {})


def test_the_commands_of_readme_run(server: Hub, client: Client, images: Path, tmp_path: Path) -> None:
    [block] = [block for block in blocks("bash", README) if "timm-etf pretrain" in block]
    # On images that are there, and fewer of them.
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "pictograms").symlink_to(images)
    block = block.replace("--epochs 5", "--epochs 1").replace("--targets embedded", f"--targets {images}")
    for line in block.splitlines()[1:]:
        done = client(*shlex.split(line, comments=True))
        assert done.returncode == 0, done.stderr
        assert "next: " in done.stdout
    assert "Nothing was sent" in done.stdout


# The command


def test_every_verb_has_its_row() -> None:
    assert set(re.findall(r"`([\w-]+)`", "\n".join(re.findall(r"^\| (`.*?) \|", text(README), re.MULTILINE)))) == {
        "timm-etf",
        *cli.VERBS,
    }


def test_readme_is_short() -> None:
    assert len(text(README).splitlines()) <= 120
    assert len(text(README).split()) <= 1300


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["pretrain", "--help"], ["models", "resnet50"], ["modles"]]
)
def test_the_command_answers_without_timm(arguments: list[str]) -> None:
    code = (
        "import sys; sys.argv = ['timm-etf', *sys.argv[1:]]\n"
        "from timm_etf.cli import main\n"
        "try:\n    main()\nfinally:\n    print('LOADED', 'timm' in sys.modules, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    loaded = done.stdout.splitlines()[-1]
    assert loaded == f"LOADED False {arguments[0] == 'models'}", done.stderr
    assert done.returncode == (2 if arguments[0] == "modles" else 0)


def test_a_shell_completes_verbs_options_and_values(tmp_path: Path) -> None:
    script = tmp_path / "completion.bash"
    commands.run("--tyro-write-completion", "bash", script, check=True)
    for line, completed in {
        "pret": "pretrain",
        "pretrain --img": "--img-size",
        "pretrain --loss dot": "dot_regression",
    }.items():
        words = shlex.split(f"timm-etf {line}")
        code = f"source {script}; COMP_WORDS=({shlex.join(words)}); COMP_CWORD={len(words) - 1}; _tyro_timm_etf"
        done = subprocess.run(
            ["bash", "-c", code + '; echo "${COMPREPLY[@]}"'], capture_output=True, text=True, check=True
        )
        assert done.stdout.split() == [completed]
