"""`timm-etf VERB`: each verb is its settings, a dataclass or the arguments of a function, imported once it is named."""

import difflib
import importlib
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import tyro

from timm_etf.errors import one_line_errors
from timm_etf.processes import is_first_process

VERBS = {
    "demo": "the demo: pretrain a small backbone twice, with a learned and a fixed head, and probe both",
    "models": "what fits: width, frame, coherence and its bound, and what a fixed classifier saves",
    "pretrain": "pretrain a timm architecture with a fixed or a learned classifier",
    "convert": "put a ready checkpoint under the fixed frame nearest to its classifier",
    "transfer": "tell whether one backbone transfers better than another",
    "geometry": "how collapsed features are, and their class covariance",
    "random-features": "regression on random features of a model's features, beside its theory",
    "retrieval": "what an index made by one model is worth to another",
    "data": "build images for machines that have none",
    "publish": "publish a run on the Hugging Face Hub",
    "run": "run timm's train.py or any script, with the variants registered",
}


def main() -> None:
    """Entry point of the `timm-etf` command."""
    if sys.argv[1:2] == ["run"]:
        run_script(sys.argv[2:])
        return
    with one_line_errors():
        verb = next(iter(sys.argv[1:]), "")
        if verb.startswith("--tyro-"):  # completion, of the verbs and of the options of each
            settings = {v: _settings(v) for v in VERBS if v != "run"}
            tyro.extras.subcommand_cli_from_dict(settings, prog="timm-etf", description=_ABOUT)
        if verb not in VERBS:
            _show_verbs(verb)
        settings = tyro.cli(_settings(verb), prog=f"timm-etf {verb}", args=_arguments(verb))
        printed = settings if isinstance(settings, str) else _run(verb, settings)
        if printed and is_first_process():
            print(printed)


def run_script(arguments: list[str]) -> None:
    """The verb `run`: everything behind it is the script's."""
    from timm_etf.run import USAGE, prepare

    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, file=sys.stdout if arguments else sys.stderr)
        sys.exit(0 if arguments else 2)
    with one_line_errors():
        start = prepare(arguments)
    start()  # and its errors are its own


_ABOUT = "Image backbones pretrained under a fixed classifier."


def _show_verbs(verb: str) -> None:
    """Print the verbs, or the version, and exit; with status 2 where neither was asked for."""
    if verb == "--version":
        print(", ".join(f"{package} {version(package)}" for package in ("timm_etf", "timm", "torch")))
        sys.exit()
    asked = verb in ("-h", "--help")
    if verb and not asked:
        close = difflib.get_close_matches(verb, VERBS, n=1)
        print(f"error: no verb {verb!r}{f'; did you mean {close[0]}?' if close else ''}\n", file=sys.stderr)
    width = max(map(len, VERBS))
    lines = ["usage: timm-etf VERB ... | --version | --tyro-write-completion SHELL FILE", "", _ABOUT, ""]
    lines += [f"  {name:<{width}}  {about}" for name, about in VERBS.items()]
    lines += ["", "timm-etf VERB --help tells the rest.", "next: timm-etf demo --out demo"]
    print("\n".join(lines), file=None if asked else sys.stderr)
    sys.exit(0 if asked else 2)


def _arguments(verb: str) -> list[str]:
    if verb != "pretrain":
        return sys.argv[2:]
    from timm_etf.pretrain.recipe import with_recipe

    return with_recipe(sys.argv[2:])


def _settings(verb: str) -> Any:
    if verb == "pretrain":
        from timm_etf.pretrain.config import PretrainConfig

        return PretrainConfig
    if verb in ("convert", "transfer", *_STUDIES):
        return _module(verb).Settings
    return {"demo": demo, "models": models, "data": data, "publish": publish}[verb]


_STUDIES = ("geometry", "random-features", "retrieval")


def _module(verb: str) -> Any:
    room = {"convert": "convert", "transfer": "transfer.run"}.get(verb, f"studies.{verb.replace('-', '_')}")
    return importlib.import_module(f"timm_etf.{room}")


def _run(verb: str, settings: Any) -> str:
    importlib.import_module("timm_etf.variants")  # which `import timm_etf` registers anywhere else
    if verb == "pretrain":
        from timm_etf.pretrain.loop import pretrain, summary

        return summary(settings, pretrain(settings))
    module = _module(verb)
    if verb == "convert":
        return module.run(settings)
    return module.summary(module.run(settings), settings.out)


def demo(out: Path, resume: bool = False) -> str:
    """The five-minute demo: pretrain a small backbone twice (learned and fixed head), probe both, export both.

    Args:
        out: Folder for everything the demo makes, new or empty.
        resume: Continue a demo that was stopped.
    """
    from timm_etf.demo import run

    run(out, resume=resume)
    return ""


def models(pattern: tyro.conf.Positional[str] = "*", num_classes: int = 1000, compute: bool = False) -> str:
    """List what fits: width, frame, coherence and its bound, and what a fixed classifier saves.

    Args:
        pattern: Wildcard of timm names, such as 'resnet*'.
        num_classes: Number of classes K.
        compute: Compute the spherical codes that are not cached yet: seconds for each width, minutes beyond 20,000
            classes.
    """
    from timm_etf import published
    from timm_etf.coverage import coverage, left_out, table

    rows = coverage(pattern, num_classes, compute=compute)
    lines = [table(rows, num_classes)]
    lines += [f"left out: {name}, {reason}" for name, reason in left_out(pattern).items()]
    variants = {row.name for row in rows}
    lines += [
        f"with weights: {name}, trained on {published.about(name)}"
        for name in published.NAMES
        if name.partition(".")[0] in variants
    ]
    return "\n".join([*lines, f"next: timm.create_model(NAME, num_classes={num_classes}) after import timm_etf"])


def data(
    action: tyro.conf.Positional[Literal["build"]],
    suite: tyro.conf.Positional[Literal["embedded", "offline"]],
    root: Path,
    seed: int = 0,
) -> str:
    """Build images to pretrain on and to transfer to, for machines that have none.

    Args:
        action: What to do.
        suite: embedded, the demo's images, from fonts that PyPI packages ship; or offline, a larger suite from npm,
            Debian and PyPI packages that are downloaded for it.
        root: Folder that receives one folder per data set.
        seed: Seed of the offline suite's splits.
    """
    from timm_etf import data

    if suite == "embedded":
        source = data.build_pictograms(root)
        lines = [str(folder) for folder in (source, *data.build_targets(root).values())]
        fits = "--in-chans 1 --img-size 40 --hflip 0"
        lines.append(f"next: timm-etf pretrain --model resnet10t_etf --data-dir {source} {fits} --out RUN")
        return "\n".join(lines)
    folders, missing = data.build_offline(root, seed=seed)
    lines = [str(folder) for folder in folders.values()]
    lines += [f"not built: {name}: {reason}" for name, reason in missing.items()]
    if folders:
        lines.append(f"next: timm-etf transfer --models NAME ... --targets offline --data-root {root} --out OUT")
    return "\n".join(lines)


def publish(
    run: tyro.conf.Positional[Path],
    repo: tyro.conf.Positional[str],
    results: tuple[Path, ...] = (),
    license: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    tag: str | None = None,
    pr: bool = False,
    message: str = "Publish with timm_etf",
    yes: bool = False,
) -> str:
    """Publish a run on the Hugging Face Hub; without --yes, show what would be uploaded.

    Args:
        run: Folder of timm-etf pretrain, or an exported folder.
        repo: Repository, ORG/NAME.
        results: results.json files of timm-etf transfer and retrieval on this model, for its card.
        license: Licence of the weights, such as apache-2.0.
        private: Whether a new repository is private; by default as the organisation has it.
        revision: Branch, by default the main one.
        tag: Tag of the published commit, such as v1.
        pr: Propose the upload as a pull request.
        message: Commit message.
        yes: Upload.
    """
    from timm_etf import hub

    planned = hub.plan(run, repo, results=results, license=license, revision=revision)
    count = len(planned.changed)
    if not yes:
        fix = f"Nothing was sent. next: the same command with --yes uploads {count} file{'s' * (count != 1)}"
        return f"{planned.table()}\n\n{planned.card_or_diff()}\n\n{fix}"
    print(planned.table(), flush=True)
    url = hub.publish(planned, private=private, tag=tag, create_pr=pr, message=message)
    lines = [f"{'published' if count else 'nothing new to upload'}: {url}"]
    at = f"@{revision}" if revision else ""
    load = f"timm.create_model('hf-hub:{repo}{at}', pretrained=True)"
    lines.append(f"next: {'merge it there' if pr else load}")
    return "\n".join(lines)
