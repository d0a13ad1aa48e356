"""params.yaml as nobody should write it: any bytes, any YAML, any value in any place; and as people do write it."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from dvc.utils.serialize import load_yaml
from hypothesis import given
from hypothesis import strategies as st

from calm_core.params import Params, load_params, parse_params
from calm_core.presets import apply_preset, load_preset
from calm_core.storage.yaml_io import read_yaml, yaml_text
from flows.workspaces import apply_overrides
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
        assert found == [parse_params(load_yaml(path))]


@tries(600)
@given(places=st.lists(st.tuples(ANY_PLACE, PLAIN | LIKELY), min_size=1, max_size=4))
def test_any_values_in_any_place(places: list[tuple[tuple[str, ...], Any]], path: Path) -> None:
    values = changed(places)
    found: list[Params] = []
    if complaint(lambda: found.append(parse_params(values))) is None:
        (params,) = found
        # What is good says the same after a trip through the file.
        path.write_text(yaml_text(params.model_dump()), encoding="utf-8")
        assert load_params(path) == params


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


def written(path: Path, key: str, value: str) -> Path:
    """The committed params.yaml in which ``key`` is written as ``value``."""
    text, times = re.subn(rf"^(\s*{key}:) *[^#\n]*", rf"\g<1> {value} ", CONTENT.decode(), count=1, flags=re.MULTILINE)
    assert times == 1
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("kl_weight", "1e-05", 0.00001),
        ("kl_weight", "3e-4", 0.0003),
        ("kl_weight", "1E3", 1000.0),
        ("kl_weight", "+.5", 0.5),
        ("kl_weight", ".5", 0.5),
        ("kl_weight", "5.", 5.0),
        ("kl_weight", "1", 1.0),
        ("kl_weight", "1_0.5", 10.5),
        ("batch_patches", "010", 10),
        ("batch_patches", "0o10", 8),
        ("batch_patches", "0x10", 16),
        ("batch_patches", "1_000", 1000),
        ("batch_patches", "+1", 1),
        ("text_field", "on", "on"),
        ("text_field", "no", "no"),
        ("text_field", "1:30", "1:30"),
        ("documents", "~", None),
        ("documents", "", None),
        ("compile", "True", True),
    ],
)
def test_values_as_dvc_reads_them(key: str, value: str, expected: object, path: Path) -> None:
    found = load_params(written(path, key, value)).model_dump()
    assert found == parse_params(load_yaml(path)).model_dump()
    (read,) = [section[key] for section in found.values() if isinstance(section, dict) and key in section]
    assert read == expected
    assert type(read) is type(expected)


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("kl_weight", "'3e-4'", "autoencoder.kl_weight is '3e-4': input should be a valid number; write 0.0003"),
        ("kl_weight", ".inf", "autoencoder.kl_weight is inf: input should be a finite number"),
        ("kl_weight", "nan", "autoencoder.kl_weight is 'nan': input should be a valid number"),
        ("kl_weight", "1:30", "autoencoder.kl_weight is '1:30': input should be a valid number"),
        ("batch_patches", "1e3", "batch_patches is 1000.0: input should be a valid integer; write 1000"),
        ("batch_patches", "'512'", "batch_patches is '512': input should be a valid integer; write 512"),
        ("documents", "none", "corpus.documents is 'none': input should be a valid integer"),
        ("botocore_version", "1.43", "botocore_version is 1.43: input should be a valid string; put it in quotes"),
        ("botocore_version", "2001-01-01", "input should be a valid string; put it in quotes"),
        ("dataset", "", 'corpus.dataset is None: input should be a valid string; write ""'),
        ("compile", "off", "runtime.compile is 'off': input should be a valid boolean; write false"),
        ("threads", "2.0", "runtime.threads is 2.0: input should be a valid integer; write 2"),
    ],
)
def test_what_is_written_wrong_is_told_how_to_write(key: str, value: str, told: str, path: Path) -> None:
    line = complaint(lambda: load_params(written(path, key, value))) or ""
    assert line.startswith(f"{path}: ")
    assert line.endswith(told)


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        (b"  steps: 560\n", b"  steps: 560\n  steps: 10\n", (1, 'is not valid YAML: .*duplicate key "steps"')),
        (b"  kl_weight", b"\tkl_weight", (0, r"is not valid YAML: .*character '\\t'")),
        (b"seed: 0", b"seed: 0\n---\nseed: 1", (1, "is not valid YAML: .*another document")),
        (b"# K, tokens", "# K, Stücke".encode("latin-1"), (0, "is not UTF-8 text; save the file as UTF-8")),
        (b"seed: 0", b"seed: &a [*a]", (None, "is not valid YAML: .*refers to a mapping or a list; write it out")),
    ],
)
def test_the_place_of_what_is_no_yaml(old: bytes, new: bytes, told: tuple[int | None, str], path: Path) -> None:
    """``told`` is how many lines after the change the fault is, if a line is named, and what is said of it."""
    assert CONTENT.count(old) >= 1
    path.write_bytes(CONTENT.replace(old, new, 1))
    line = complaint(lambda: load_params(path)) or ""
    after, problem = told
    number = CONTENT[: CONTENT.index(old)].count(b"\n") + 1
    place = "" if after is None else f", line {number + after}"
    assert re.fullmatch(f"{re.escape(str(path))}{place} {problem}.*", line)


@pytest.mark.parametrize(
    "content", [b"\xef\xbb\xbf" + CONTENT, CONTENT.replace(b"\n", b"\r\n"), b"---\n" + CONTENT + b"...\n"]
)
def test_marks_and_line_ends_of_other_editors(content: bytes, path: Path) -> None:
    path.write_bytes(content)
    assert load_params(path) == parse_params(VALUES)


@tries(100)
@given(weight=st.floats(0, 1e300))
def test_any_number_through_overrides_and_presets(weight: float, path: Path) -> None:
    """What `dvc exp run -S` and the flows write is what a stage reads; ``apply_overrides`` calls DVC's own."""
    path.write_bytes(CONTENT)
    apply_overrides(path, [f"autoencoder.kl_weight={weight!r}"])
    assert load_params(path).autoencoder.kl_weight == weight
    assert "# K, tokens a latent vector" in path.read_text(encoding="utf-8")
    path.write_text(yaml_text({"autoencoder": {"kl_weight": weight}}), encoding="utf-8")
    assert read_yaml(path) == load_yaml(path) == {"autoencoder": {"kl_weight": weight}}


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("autoencoder.kl_weight=0.00001", ("autoencoder", "kl_weight", 0.00001)),
        ("autoencoder.kl_weight=3e-4", ("autoencoder", "kl_weight", 0.0003)),
        ("corpus.documents=7", ("corpus", "documents", 7)),
        ("corpus.documents=null", ("corpus", "documents", None)),
        ("corpus.paths=[a.txt,'b c.txt']", ("corpus", "paths", ["a.txt", "b c.txt"])),
        ('corpus.dataset="1e-5"', ("corpus", "dataset", "1e-5")),
        ('corpus.configuration="010"', ("corpus", "configuration", "010")),
        ("corpus.configuration=on", ("corpus", "configuration", "on")),
        ("runtime.compile=true", ("runtime", "compile", True)),
    ],
)
def test_overrides_as_people_write_them(override: str, expected: tuple[str, str, object], path: Path) -> None:
    path.write_bytes(CONTENT)
    apply_overrides(path, [override])
    section, key, value = expected
    assert getattr(getattr(load_params(path), section), key) == value


def test_a_preset_over_small_numbers(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parent)
    (path.parent / "presets").mkdir(exist_ok=True)
    (path.parent / "presets/small.yaml").write_text("calm:\n  learning_rate: 1e-7\n", encoding="utf-8")
    written(path, "kl_weight", "3e-4")
    (path.parent / "link.yaml").symlink_to("params.yaml")
    apply_preset("small", Path("link.yaml"))
    assert Path("link.yaml").is_symlink()
    params = load_params(path)
    assert (params.autoencoder.kl_weight, params.calm.learning_rate) == (0.0003, 1e-7)
    assert "kl_weight: 3e-4" in path.read_text(encoding="utf-8")
