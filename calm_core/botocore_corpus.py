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
from typing import Any

import botocore

LICENCE = "Apache-2.0 (botocore, https://github.com/boto/botocore)"

# Tags inside a sentence; any other separates words.
_INLINE = {"a", "b", "code", "em", "i", "link", "replaceable", "strong", "u"}


# A tag with its name, or a comment. A parser of HTML finds the same in all of botocore, in six times the time.
_TAG = re.compile(r"</?([a-zA-Z][^\s/>]*)[^>]*>|<!--.*?-->", re.DOTALL)


def plain_text(markup: str) -> str:
    """The readable text of an HTML fragment on one line."""
    if "<" in markup or "&" in markup:
        markup = html.unescape(_TAG.sub(_space, markup))
    return " ".join(markup.split())


def _space(tag: re.Match[str]) -> str:
    return "" if (tag[1] or "").lower() in _INLINE else " "


def botocore_documents(data: Path | None = None) -> Iterator[dict[str, str]]:
    """Yield {"text": ...} for each distinct documentation string, services in alphabetical order.

    ``data`` is botocore's folder of API models; by default the installed package's.
    """
    data = data or Path(botocore.__file__).parent / "data"
    seen: set[str] = set()
    for service in sorted(path for path in data.iterdir() if path.is_dir()):
        versions = sorted(path for path in service.iterdir() if path.is_dir())
        for model in sorted(versions[-1].glob("service-2.json*")) if versions else ():
            raw = gzip.decompress(model.read_bytes()) if model.suffix == ".gz" else model.read_bytes()
            for markup in _documentation(json.loads(raw)):
                text = plain_text(markup)
                if text and text not in seen:
                    seen.add(text)
                    yield {"text": text}


def _documentation(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "documentation" and isinstance(value, str):
                yield value
            else:
                yield from _documentation(value)
    elif isinstance(node, list):
        for value in node:
            yield from _documentation(value)
