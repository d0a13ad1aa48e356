"""Files of prompts as people have them: each prompt is what an editor or json.dumps wrote, whatever it contains."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calm_core.errors import CalmError
from calm_core.inference.prompt_files import read_prompts
from tests.reliability.support.bad_input import tries

SEPARATORS = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\rh"
"""At each of these characters str.splitlines splits."""

MARK = b"\xef\xbb\xbf"


def prompts(content: bytes, folder: Path, suffix: str = ".txt") -> list[str]:
    path = folder / f"prompts{suffix}"
    path.write_bytes(content)
    return read_prompts(path)


@pytest.mark.parametrize("suffix", [".jsonl", ".JSONL", ".ndjson", ".json"])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_json_strings_hold_any_character(suffix: str, ascii_only: bool, tmp_path: Path) -> None:
    expected = [SEPARATORS, "", "nul \0", "line\nfeed", " space ", "ü 😀"]
    lines = [json.dumps({"prompt": prompt, "n": 1}, ensure_ascii=ascii_only) for prompt in expected]
    for content in ("\n".join(lines), "\n".join(lines) + "\n", "\r\n".join(lines) + "\r\n", "\n\n \t\n".join(lines)):
        assert prompts(content.encode(), tmp_path, suffix) == expected
        assert prompts(MARK + content.encode(), tmp_path, suffix) == expected


def test_lines_of_text_end_at_line_feeds_alone(tmp_path: Path) -> None:
    content = f"{SEPARATORS}\r\n\n  the\t\nlast".encode()
    expected = [SEPARATORS, "", "  the\t", "last"]
    assert prompts(content, tmp_path) == expected
    assert prompts(content + b"\n", tmp_path) == expected
    assert prompts(MARK + content, tmp_path, "") == expected
    assert prompts(b"\n", tmp_path) == [""]


@tries(200)
@given(expected=st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=5))
def test_any_prompts(expected: list[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.getbasetemp()
    lines = "".join(json.dumps({"prompt": prompt}, ensure_ascii=False) + "\n" for prompt in expected)
    assert prompts(lines.encode(), folder, ".jsonl") == expected


@pytest.mark.parametrize(
    ("content", "suffix", "told"),
    [
        (b'{"prompt": "a"}\n\n{"prompt": 3}\n', ".jsonl", ', line 3 is no object with a prompt: {"prompt": "..."}'),
        (b'{"prompt": "a"}\n{"prompt": nu', ".jsonl", ', line 2 is no object with a prompt: {"prompt": "..."}'),
        (b'{"prompt": "a"}\n{"text": "b"}\n', ".jsonl", ', line 2 is no object with a prompt: {"prompt": "..."}'),
        (b'["a"]\n', ".jsonl", ', line 1 is no object with a prompt: {"prompt": "..."}'),
        (b'{"prompt": "a"}\n{"prompt": "\\ud800"}\n', ".jsonl", r", line 2 is not UTF-8 text: '\ud800'"),
        (b"a\nb\n\xff\n", ".txt", ", line 3 is not UTF-8 text; save the file as UTF-8"),
        (MARK + b"a\n\xff\n", ".txt", ", line 2 is not UTF-8 text; save the file as UTF-8"),
        ("a\nb\n".encode("utf-16"), ".txt", ", line 1 is not UTF-8 text; save the file as UTF-8"),
        (b"", ".txt", " holds no prompt"),
        (MARK, ".txt", " holds no prompt"),
        (b"\n \n", ".jsonl", " holds no prompt"),
    ],
)
def test_the_place_of_what_is_no_prompt(content: bytes, suffix: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(CalmError) as raised:
        prompts(content, tmp_path, suffix)
    assert str(raised.value) == f"{tmp_path}/prompts{suffix}{told}"
