"""`NAME,argument=value,...`: how a command line names a model or a data set with its arguments."""

import ast
import difflib
import math
from collections.abc import Iterable, Mapping
from typing import Any

from timm_etf.errors import UsageError

_BRACKETS = {"(": ")", "[": "]", "{": "}"}
_WORDS = {"true": True, "yes": True, "false": False, "no": False, "none": None}


def split(spec: str) -> tuple[str, dict[str, str]]:
    """What is named, and its arguments as text; commas and equals signs inside brackets and quotes separate nothing.

    Raises:
        UsageError: If an argument is not NAME=VALUE.

    Example:
        >>> split("resnet10t,channels=(32, 64),pretrained=False")
        ('resnet10t', {'channels': '(32, 64)', 'pretrained': 'False'})
    """
    parts: list[str] = []
    waiting: list[str] = []
    start = 0
    characters = enumerate(spec)
    for at, character in characters:
        quoted = bool(waiting) and waiting[-1] in "'\""
        if quoted and character == "\\":
            next(characters, None)
        elif waiting and character == waiting[-1]:
            waiting.pop()
        elif quoted:
            continue
        elif character in _BRACKETS:
            waiting.append(_BRACKETS[character])
        elif character in "'\"" and parts and "=" in spec[start:at]:  # an apostrophe in a folder's name opens nothing
            waiting.append(character)
        elif character == "," and not waiting:
            parts.append(spec[start:at])
            start = at + 1
    first, *rest = [*parts, spec[start:]]
    arguments = {}
    for part in rest:
        name, equals, value = part.partition("=")
        if not equals or not name.isidentifier():
            raise UsageError(f"{part!r} in {spec!r} is no argument: write NAME,argument=value.")
        arguments[name] = value
    return first, arguments


def arguments(option: str, items: tuple[str, ...], own: dict[str, str]) -> dict[str, Any]:
    """The NAME=VALUE arguments of an option, as `value` reads them.

    Args:
        option: Its name, for messages.
        items: NAME=VALUE each.
        own: Names that have an option of their own, with what that is.

    Raises:
        UsageError: If one is not NAME=VALUE, or has an option of its own.

    Example:
        >>> arguments("--model-kwargs", ("frame=gaussian", "logit_scale=16"), {})
        {'frame': 'gaussian', 'logit_scale': 16}
    """
    parsed: dict[str, Any] = {}
    for item in items:
        name, equals, text = item.partition("=")
        if not equals or not name.isidentifier():
            raise UsageError(f"{option} takes NAME=VALUE, got {item!r}.")
        if name in own:
            raise UsageError(f"{option} {name} has an option of its own: use {own[name]}.")
        parsed[name] = value(text)
    return parsed


def require_ranges(settings: Mapping[str, Any], ranges: Mapping[str, str]) -> None:
    """Refuse numbers, or tuples of them, outside of the intervals that are written for some of the settings.

    Raises:
        UsageError: Naming the option and its interval.

    Example:
        >>> require_ranges({"lr": 0.1, "scale": (0.1, 1.0), "out": "run"}, {"lr": "(0, inf)", "scale": "(0, 1]"})
    """
    for name, interval in ranges.items():
        value = settings[name]
        values = () if value is None else value if isinstance(value, tuple) else (value,)
        low, high = map(float, interval[1:-1].split(","))
        for v in values:
            above = v >= low if interval[0] == "[" else v > low
            below = v <= high if interval[-1] == "]" else v < high
            if not (above and below and math.isfinite(v)):
                raise UsageError(f"--{name.replace('_', '-')} must be in {interval}, got {v}.")


def unknown(what: str, name: str, known: Iterable[str], otherwise: str) -> str:
    """A message for a name that is not known: the nearest that are, or what else helps."""
    close = difflib.get_close_matches(name, known, n=3)
    return f"Unknown {what} {name!r}: " + (f"did you mean {' or '.join(close)}?" if close else f"{otherwise}.")


def value(text: str) -> Any:
    """A Python literal, yes or no in any spelling, or the text itself.

    Example:
        >>> value("1e-3"), value("no"), value("(3, 4)"), value("mlp")
        (0.001, False, (3, 4), 'mlp')
    """
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
