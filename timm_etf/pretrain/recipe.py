"""Recipes: the options of a run in a yaml file, under their own names; some come with the package."""

import dataclasses
import difflib
import json
from pathlib import Path

import yaml

from timm_etf.atomic import write_text
from timm_etf.errors import UsageError, first_line
from timm_etf.pretrain.config import PretrainConfig

PACKAGED = Path(__file__).with_name("recipes")
"""Recipes that `--config` knows by name."""


def with_recipe(arguments: list[str]) -> list[str]:
    """A command line in which `--config FILE` or NAME is replaced by the options in that file, before all others.

    Args:
        arguments: Of the command, without its name; an option that is given twice counts as it is given last.

    Raises:
        UsageError: If the file cannot be read, or names something that is no option.

    Example:
        >>> with_recipe(["--model", "resnet50_etf", "--config", "fixed-frame"])
        ['--model-kwargs', 'projector=mlp', '--loss', 'ntce', '--model', 'resnet50_etf']
    """
    rest: list[str] = []
    files: list[Path] = []
    items = iter(arguments)
    for item in items:
        option, equals, value = item.partition("=")
        if option != "--config":
            rest.append(item)
        elif not (file := value if equals else next(items, "")):
            raise UsageError(f"--config takes a yaml file, or one of {', '.join(p.stem for p in PACKAGED.iterdir())}.")
        else:
            known = PACKAGED / f"{file}.yaml"
            files.append(known if known.exists() else Path(file))
    return [argument for file in files for argument in _arguments(file)] + rest


def _arguments(file: Path) -> list[str]:
    """The options in a file, as on a command line."""
    try:
        options = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except (OSError, ValueError, yaml.YAMLError) as e:
        where = f", line {e.problem_mark.line + 1}" if isinstance(e, yaml.MarkedYAMLError) and e.problem_mark else ""
        raise UsageError(f"Cannot read --config {file}{where} ({first_line(e)}).") from None
    if not isinstance(options, dict):
        raise UsageError(f"--config {file} holds no options: write one per line, as in batch_size: 256")
    known = [field.name for field in dataclasses.fields(PretrainConfig)]
    arguments: list[str] = []
    for key, value in options.items():
        name = str(key).replace("-", "_")
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            raise UsageError(f"--config {file}: no option {key!r}{f'; did you mean {close[0]}?' if close else '.'}")
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            arguments.append(flag if value else f"--no-{flag[2:]}")
        elif isinstance(value, dict):
            arguments += [flag, *(f"{k}={v}" for k, v in value.items())]
        else:
            arguments += [flag, *map(str, value if isinstance(value, list) else [value])]
    return arguments


def write(config: PretrainConfig, file: Path) -> None:
    """Write all options of a run, so that `--config` repeats it."""
    options = json.loads(json.dumps(dataclasses.asdict(config), default=str))  # tuples as lists, paths as text
    del options["resume"]
    write_text(file, yaml.safe_dump(options, sort_keys=False))
