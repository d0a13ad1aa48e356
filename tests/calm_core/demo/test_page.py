"""`calm demo` as people have it: the process, its page in a real browser, and Ctrl-C."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from calm_core.inference.language_model import load_language_model
from tests import ROOT
from tests.support.browser import BROWSER, browser_page

HOSTILE = "a <b id=taken>\"'"


@pytest.fixture(scope="module")
def demo(endless_folders: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The running command, and its address."""
    models = [f"--model={endless_folders / name}" for name in ("calm", "transformer")]
    process = subprocess.Popen(
        [sys.executable, "-m", "calm_core.cli", "demo", *models, "--port", "0", "--device", "cpu"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    yield process, process.stdout.readline().partition(" ")[0]
    process.kill()
    process.communicate()


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium here; on Debian: apt-get install chromium")
def test_both_texts_are_seen_to_grow(
    demo: tuple[subprocess.Popen[str], str], endless_folders: Path, tmp_path: Path
) -> None:
    process, address = demo
    with browser_page(tmp_path / "browser") as page:
        page.size(1150, 800)
        page.visit(address)
        page.until("document.querySelectorAll('.model').length === 2")
        assert page.evaluate("document.activeElement.id") == "prompt"

        def pieces(number: int) -> str:
            return f"document.querySelectorAll('.model')[{number}].querySelectorAll('.piece')"

        def field(name: str, value: str) -> None:
            page.evaluate(f"document.getElementById('{name}').value = '{value}'")
            page.evaluate(f"document.getElementById('{name}').dispatchEvent(new Event('input', {{bubbles: true}}))")

        # What is typed is text, before and after a model has read it.
        page.evaluate("document.getElementById('prompt').select()")
        page.type(HOSTILE)
        assert page.evaluate("document.getElementById('draws').disabled")  # N says nothing at T = 1
        assert page.evaluate("document.getElementById('approximate').hidden")
        field("tokens", "1000000")
        page.click("#write")
        for least in (2, 5):
            for number in (0, 1):
                page.until(f"{pieces(number)}.length >= {least}")
        page.click("#stop")
        page.until("document.getElementById('told').textContent === 'stopped'")
        assert page.evaluate("document.querySelector('.model .prompt').textContent") == HOSTILE
        assert not page.evaluate("document.querySelector('#models').textContent.includes('approximated')")
        assert page.evaluate("document.getElementById('taken')") is None

        # The stop was one: the next text has its turn, and comes to its end.
        field("temperature", "0.5")
        assert not page.evaluate("document.getElementById('draws').disabled")
        assert not page.evaluate("document.getElementById('approximate').hidden")
        field("draws", "20")
        field("tokens", "12")
        field("seed", "3")
        page.click("#write")
        page.until("!document.getElementById('write').disabled")
        assert page.evaluate("document.getElementById('told').textContent") == ""
        for number, (name, size) in enumerate((("calm", 2), ("transformer", 1))):
            model = load_language_model(endless_folders / name)
            assert page.evaluate(f"{pieces(number)}.length") == 12 // size
            shown = page.evaluate(f"[...{pieces(number)}].map(piece => piece.textContent).join('')")
            (alone,) = model.generate([HOSTILE], tokens=12, temperature=0.5, seed=3)
            assert number == 0 or shown == alone  # of CALM, `generate` chooses from more samples
            assert len(shown) == len(alone) == 12
            said = page.evaluate(f"document.querySelectorAll('.count')[{number}].textContent")
            assert said.startswith(f"12 tokens in {12 // size} steps")
            assert ("6 steps (T approximated in 6), 120 samples" in said) is (number == 0)
            speed = page.evaluate(f"document.querySelectorAll('.speed')[{number}].textContent")
            assert speed.endswith(" tokens/s")

        # A mistake is one line, and what was written stays.
        field("tokens", "0")
        page.click("#write")
        page.until("document.getElementById('told').className.includes('mistake')")
        told = page.evaluate("document.getElementById('told').textContent")
        assert told == "tokens: should be greater than or equal to 1"
        assert page.evaluate(f"{pieces(0)}.length") == 6

        for width in (1150, 400):
            page.size(width, 800)
            assert page.evaluate("document.documentElement.scrollWidth") <= width

        # Ctrl-C in the middle of a text.
        field("tokens", "1000000")
        page.click("#write")
        page.until(f"{pieces(1)}.length >= 20")
        process.send_signal(signal.SIGINT)
        page.until("!document.getElementById('write').disabled")
        assert page.evaluate("document.getElementById('told').textContent") == "the server ended before the texts did"
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 130
        assert errors == ""
