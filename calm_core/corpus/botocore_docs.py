"""The default corpus: the AWS API reference prose that botocore ships in its wheel (Apache-2.0).

Every "documentation" string of each service's newest API version, as plain text: markup removed, entities
decoded, white space folded, exact duplicates dropped. Some 30 MB of English that a package registry serves
and the lock file pins.
"""

import gzip
import html
import json
import re
from collections.abc import Iterator
from pathlib import Path

import botocore

LICENCE = "Apache-2.0 (botocore, https://github.com/boto/botocore)"

_DOCUMENTATION = re.compile(r'"documentation"\s*:\s*("[^"\\]*(?:\\.[^"\\]*)*")')

# Tags inside a sentence leave nothing behind; any other, or a comment, separates words. A parser of HTML finds the same
# in all of botocore, in six times the time.
_INLINE = re.compile(r"</?(?:a|b|code|em|i|link|replaceable|strong|u)(?:[\s/][^>]*)?>", re.IGNORECASE)
_SEPARATING = re.compile(r"</?[a-zA-Z][^>]*>|<!--.*?-->", re.DOTALL)


def plain_text(markup: str) -> str:
    """The readable text of an HTML fragment on one line."""
    if "<" in markup or "&" in markup:
        markup = html.unescape(_SEPARATING.sub(" ", _INLINE.sub("", markup)))
    return " ".join(markup.split())


def botocore_documents(data: Path | None = None) -> Iterator[dict[str, str]]:
    """Yield {"text": ..., "service": ...} for each distinct documentation string, services in alphabetical order.

    ``data`` is botocore's folder of API models; by default the installed package's.
    """
    data = data or Path(botocore.__file__).parent / "data"
    seen_markup, seen = set[str](), set[str]()
    for service in sorted(path for path in data.iterdir() if path.is_dir()):
        # Folders are named by dates, so the last name is the newest version.
        versions = sorted(path for path in service.iterdir() if path.is_dir())
        for model in sorted(versions[-1].glob("service-2.json*")) if versions else ():
            raw = gzip.decompress(model.read_bytes()) if model.suffix == ".gz" else model.read_bytes()
            for markup in _documentation(raw.decode()):
                # Before the markup is removed, which takes far longer than a look-up.
                if markup in seen_markup:
                    continue
                seen_markup.add(markup)
                text = plain_text(markup)
                if text and text not in seen:
                    seen.add(text)
                    yield {"text": text, "service": service.name}


def _documentation(model: str) -> list[str]:
    """Every "documentation" string of a JSON text, in its order."""
    # A quotation mark inside a string is escaped, so what looks like such a key is one. Parsing all of a model and
    # looking through it would take twice as long.
    found: list[str] = json.loads(f"[{','.join(_DOCUMENTATION.findall(model))}]")
    return found
