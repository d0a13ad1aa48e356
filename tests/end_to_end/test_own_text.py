"""README's "Your own text": its commands as they stand there, from a folder of .txt files to a generated sentence."""

import json
import random
import re
import shlex
from pathlib import Path

import pytest
import yaml

from calm_core.params import Params
from calm_core.presets import load_preset
from tests import ROOT
from tests.end_to_end.test_pipeline import BIN, clone, run

SENTENCE = "the old man and a small woman walk under green trees by the river of long words at night"
WORDS = SENTENCE.split()


def commands() -> list[str]:
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("### Your own text")[1]
    block = re.search(r"```\n(.*?)```", section, re.DOTALL)
    assert block
    return block[1].splitlines()


def write_text(folder: Path) -> list[str]:
    """Three books of 400 paragraphs; returns the paragraphs."""
    draws = random.Random(0)
    paragraphs = [" ".join(draws.choices(WORDS, k=draws.randrange(10, 60))).capitalize() + "." for _ in range(1200)]
    folder.mkdir()
    for book in range(3):
        content = "\n\n".join(paragraphs[book * 400 : book * 400 + 400])
        (folder / f"Book {book}.txt").write_text(content, encoding="utf-8", newline="\r\n")
    (folder / "README.md").write_text("About these books.")
    return paragraphs


def test_the_commands_are_four_and_set_what_there_is() -> None:
    assert [line.split()[0] for line in commands()] == ["source", "calm", "dvc", "calm"]
    preset, changes = shlex.split(commands()[1], comments=True)[2], shlex.split(commands()[2])[3:]
    params = load_preset(preset).model_dump()
    for option, change in zip(changes[::2], changes[1::2], strict=True):
        assert option == "-S"
        (section, key), value = change.split("=")[0].split("."), change.split("=", 1)[1]
        assert key in params[section]
        params[section][key] = yaml.safe_load(value)
    assert Params.model_validate(params).corpus.paths == ["text"]


@pytest.mark.slow
def test_the_commands_end_in_a_sentence(tmp_path: Path) -> None:
    folder = clone(tmp_path)
    (folder / ".venv/bin").mkdir(parents=True)
    (folder / ".venv/bin/activate").write_text(f"PATH={shlex.quote(str(BIN))}:$PATH\n")
    paragraphs = write_text(folder / "text")
    result = run(folder, "bash", "-e", "-c", "\n".join(commands()))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "text/Book 2.txt; left out: text/README.md" in result.stdout + result.stderr
    splits = json.loads((folder / "data/tokens/description.json").read_text())["splits"].values()
    assert sum(split["documents"] for split in splits) == len(paragraphs)
    assert sum(split["characters"] for split in splits) == sum(map(len, paragraphs))
    sentence = result.stdout.splitlines()[-1]
    assert sentence.startswith("The")
    assert len(sentence) > 20
    assert set(re.findall("[a-z]+", sentence)) & set(WORDS)
