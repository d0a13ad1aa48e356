"""A page keeps all but its generated sections."""

from pathlib import Path

import pytest

from benchmarks.pages import rewrite_section


def test_a_section_is_rewritten_and_the_rest_stays(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- a -->\nold\n<!-- end of a -->\nafter <!-- b -->\n", encoding="utf-8")
    rewrite_section(page, "a", "new")
    assert page.read_text(encoding="utf-8") == "before\n<!-- a -->\nnew\n<!-- end of a -->\nafter <!-- b -->\n"
    with pytest.raises(ValueError, match="end of b"):
        rewrite_section(page, "b", "new")
