from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from timm_etf import UsageError, specs
from timm_etf.features.candidates import Candidate, parse_models

LITERALS = st.recursive(
    st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.text(), inner),
    max_leaves=4,
)


@given(st.dictionaries(st.from_regex(r"[a-z_]{1,8}", fullmatch=True), LITERALS))
def test_any_literal_comes_back(arguments: dict[str, object]) -> None:
    text = ",".join(["name", *(f"{k}={v!r}" for k, v in arguments.items())])
    name, found = specs.split(text)
    assert name == "name"
    assert {k: specs.value(v) for k, v in found.items()} == arguments


@pytest.mark.parametrize("text", ["name,x", "name,=3", "name,a b=3"])
def test_what_is_no_argument(text: str) -> None:
    with pytest.raises(UsageError, match="is no argument"):
        specs.split(text)


@pytest.mark.parametrize(
    ("text", "label", "name"),
    [
        ("FOLDER", "lr=0.1", "FOLDER/export"),
        ("FOLDER/export", "lr=0.1", "FOLDER/export"),
        ("mine=FOLDER", "mine", "FOLDER/export"),
        ("mine=local-dir:FOLDER/export", "mine", "FOLDER/export"),
        ("local-dir:FOLDER/export", "lr=0.1", "FOLDER/export"),
    ],
)
def test_folders_of_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, label: str, name: str) -> None:
    folder = tmp_path / "lr=0.1"
    (folder / "export").mkdir(parents=True)
    (folder / "export" / "config.json").write_text("{}")
    expected = [Candidate(label, f"local-dir:{name.replace('FOLDER', str(folder))}")]
    assert parse_models([text.replace("FOLDER", str(folder))]) == expected
    monkeypatch.chdir(tmp_path)
    assert parse_models([text.replace("FOLDER", "lr=0.1")])[0].label == label
