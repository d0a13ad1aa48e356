"""params.yaml as nobody should write it: any bytes, any YAML, any value in any place."""

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from calm_core.params import Params, load_params, parse_params
from calm_core.presets import apply_preset, load_preset
from tests import ROOT
from tests.reliability.support.bad_input import PLAIN, TEXTS, complaint, damaged, tries

CONTENT = (ROOT / "params.yaml").read_bytes()
VALUES = yaml.safe_load(CONTENT)
PLACES = [(section,) for section in VALUES] + [
    (section, key) for section, values in VALUES.items() if isinstance(values, dict) for key in values
]

SYNTAX = st.text(st.sampled_from("-?:,[]{}#&*!|>'\"%@`=<~ \n\t09aé.eE_x"), max_size=60)
"""Text from the characters that mean something in YAML."""

TAGGED = st.builds(
    "{}: !!{} {}\n".format,
    st.sampled_from(["seed", "calm", "x"]),
    st.sampled_from(
        ["int", "float", "bool", "null", "timestamp", "binary", "set", "omap", "pairs", "str", "map", "seq",
         "python/name:os.system", "python/object/apply:os.system", "python/module:antigravity"]
    ),
    st.sampled_from(["", "x", "1", "2001-99-99", "[1, 2]", "[a: b]", "{a: b}", "'~'", "0x", "1:99", ".e", "[echo]"]),
)  # fmt: skip
"""Values under tags that they may not go with, or that would run code."""


def changed(places: list[tuple[tuple[str, ...], Any]]) -> dict[str, Any]:
    values: dict[str, Any] = copy.deepcopy(VALUES)
    for place, value in places:
        at = values
        for part in place[:-1]:
            at = at[part] if isinstance(at.get(part), dict) else {}
        at[place[-1]] = value
    return values


LIKELY = st.sampled_from([-1, 0, 1, 2, 3, 7, 64, 10**6, 2**20, 10**12, 2**63, 0.5, 1e-30, 1e300, "", "auto", "\0", []])
ANY_PLACE = st.sampled_from(PLACES) | st.tuples(st.sampled_from(list(VALUES)), TEXTS) | st.tuples(TEXTS)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bad_params") / "params.yaml"


@tries(600)
@given(content=st.binary(max_size=200) | TEXTS.map(str.encode) | SYNTAX.map(str.encode) | TAGGED.map(str.encode))
def test_any_file(content: bytes, path: Path) -> None:
    path.write_bytes(content)
    assert complaint(lambda: load_params(path))


@tries(200)
@given(content=damaged(CONTENT))
def test_the_committed_file_damaged(content: bytes, path: Path) -> None:
    path.write_bytes(content)
    found: list[Params] = []
    if complaint(lambda: found.append(load_params(path))) is None:
        assert found == [parse_params(yaml.safe_load(content))]


@tries(600)
@given(st.lists(st.tuples(ANY_PLACE, PLAIN | LIKELY), min_size=1, max_size=4))
def test_any_values_in_any_place(places: list[tuple[tuple[str, ...], Any]]) -> None:
    values = changed(places)
    found: list[Params] = []
    if complaint(lambda: found.append(parse_params(values))) is None:
        (params,) = found
        # What is good says the same after a trip through the file.
        again = parse_params(yaml.safe_load(yaml.safe_dump(params.model_dump(), allow_unicode=True)))
        assert again == params


@pytest.mark.slow
@tries(50)
@given(overlay=st.dictionaries(st.sampled_from(list(VALUES)) | TEXTS, PLAIN, max_size=3) | PLAIN, name=TEXTS)
def test_any_preset(overlay: Any, name: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parent)
    path.write_bytes(CONTENT)
    presets = path.parent / "presets"
    presets.mkdir(exist_ok=True)
    try:
        (presets / "one.yaml").write_text(yaml.safe_dump(overlay, allow_unicode=True), encoding="utf-8")
    except ValueError:  # an integer that Python does not print
        (presets / "one.yaml").write_text("{", encoding="utf-8")
    refused = complaint(lambda: apply_preset("one"))
    assert (path.read_bytes() == CONTENT) or refused is None
    load_params(path)
    assert complaint(lambda: load_preset(name))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("references that stand for billions of values", "a0: &a0 [x]\n" + "".join(
            f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12))),
        ("merges that stand for billions of values", "a0: &a0 {x: 1}\n" + "".join(
            f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}\n" for n in range(1, 12))),
        ("a list that holds itself", "a: &a [*a]\n"),
        ("a hundred thousand brackets", "[" * 100_000),
        ("a hundred thousand dashes", "- " * 100_000),
        ("a hundred thousand braces", "{a: " * 60_000),
        ("an integer of as many digits", "seed: " + "9" * 100_000),
        ("another one", "seed: 0x" + "f" * 100_000),
        ("a string of as many characters", "corpus: " + "x" * 200_000),
        ("ten megabytes", "# " + "x" * 10_000_000),
        ("a file of zeros", "\0" * 1000),
        ("as many unknown keys", "".join(f"k{n}: 1\n" for n in range(10_000))),
        ("keys of a terminal's commands", 'seed: 0\n"\\e[2J\\e]0;owned\\a": 1\n'),
    ],
)  # fmt: skip
def test_files_that_are_built_to_harm(name: str, content: str, path: Path) -> None:
    path.write_text(content, encoding="utf-8")
    assert complaint(lambda: load_params(path))


def test_values_that_cannot_be_printed() -> None:
    endless: list[Any] = []
    endless.append(endless)
    deep: list[Any] = []
    for _ in range(10_000):
        deep = [deep]
    for value in (10**5000, endless, deep):
        assert "calm.steps is " in (
            complaint(lambda value=value: parse_params(changed([(("calm", "steps"), value)]))) or ""
        )


def test_params_that_are_no_file(path: Path) -> None:
    assert complaint(lambda: load_params(path.parent))


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "/etc/passwd", "..", ".", "", "../params", "\0", "smoke.yaml", "*"]
)
def test_a_preset_is_a_name_and_no_path(name: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parent)
    path.write_bytes(CONTENT)
    (path.parent / "secret.yaml").write_bytes(CONTENT)
    for harmful in (name, "../secret", str(path.parent / "secret")):
        assert "is unknown" in (complaint(lambda harmful=harmful: apply_preset(harmful)) or "")
