"""The tokens that tell a model where one document ends and the next begins.

A run puts an end-of-text token after each document, or what the tokenizer itself puts around a text, as
`tokenizer.document_marks` says. The reference implementation has the latter, and joins that (``group_texts`` of its
training scripts, also for evaluation): with the Llama 3 tokenizer a BOS before each document and nothing after it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from tokenizers import Tokenizer

from calm_core.errors import CalmError
from calm_core.params import DocumentMarksKind
from calm_core.storage.json_io import read_json
from calm_core.storage.provenance import DESCRIPTION, TOKENIZER
from calm_core.tokens.tokenizer import end_of_text_id, load_tokenizer, template_ids


@dataclass(frozen=True)
class DocumentMarks:
    """Token ids before and after each document; at least one of either."""

    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()

    @property
    def filler(self) -> int:
        """The token to fill a place with that no text takes: one that a model has seen between documents."""
        return self.before[0] if self.before else self.after[-1]


def document_marks(kind: DocumentMarksKind, tokenizer: Tokenizer) -> DocumentMarks:
    """The marks of ``kind`` that ``tokenizer`` has."""
    return post_processor_marks(tokenizer) if kind == "post_processor" else end_of_text_marks(tokenizer)


def end_of_text_marks(tokenizer: Tokenizer) -> DocumentMarks:
    """An end-of-text token after each document."""
    return DocumentMarks(after=(end_of_text_id(tokenizer),))


def post_processor_marks(tokenizer: Tokenizer) -> DocumentMarks:
    """What the post-processor of ``tokenizer`` puts around a text; where that is nothing, ``end_of_text_marks``."""
    marks = DocumentMarks(*template_ids(tokenizer))
    return marks if marks != DocumentMarks() else end_of_text_marks(tokenizer)


def told_kind(values: Mapping[str, Any], file: Path) -> DocumentMarksKind:
    """The kind of marks that ``values`` tell, of ``file``, a model's config.json or the description of tokens.

    It is ``end_of_text`` where none is told. Raises CalmError where what is told is no kind.
    """
    kinds: tuple[DocumentMarksKind, ...] = get_args(DocumentMarksKind)
    told = values.get("document_marks", "end_of_text")
    found = next((kind for kind in kinds if kind == told), None)
    if found is None:
        raise CalmError(f"{file} is damaged: document_marks is {told!r}, not {' or '.join(kinds)}")
    return found


def kind_of_tokens(tokens: Path) -> DocumentMarksKind:
    """The kind of marks around the documents of ``tokens``, a folder that the stage tokenise wrote."""
    return told_kind(read_json(tokens / DESCRIPTION), tokens / DESCRIPTION)


def marks_of_tokens(tokens: Path) -> DocumentMarks:
    """The marks around the documents of ``tokens``, a folder that the stage tokenise wrote."""
    return document_marks(kind_of_tokens(tokens), load_tokenizer(tokens / TOKENIZER))
