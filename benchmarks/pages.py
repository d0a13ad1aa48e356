"""Sections of a Markdown page that are generated: what stands between two comments is written anew."""

from pathlib import Path

from calm_core.storage.atomic import write_text


def rewrite_section(path: Path, name: str, text: str) -> None:
    """Put ``text`` between the comments ``<!-- name -->`` and ``<!-- end of name -->`` of the page ``path``."""
    page = path.read_text(encoding="utf-8")
    before, begin, rest = page.partition(f"<!-- {name} -->")
    _, end, after = rest.partition(f"<!-- end of {name} -->")
    if not end:
        raise ValueError(f"{path} has no <!-- {name} --> with an <!-- end of {name} --> after it")
    write_text(path, f"{before}{begin}\n{text}\n{end}{after}")
