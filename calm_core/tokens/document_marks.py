"""The tokens that tell a model where one document ends and the next begins.

This project puts an end-of-text token after each document. The reference implementation feeds its models what the
tokenizer itself makes of a text and joins that (``group_texts`` of its training scripts, also for evaluation): with the
Llama 3 tokenizer a BOS before each document and nothing after it.
"""

from dataclasses import dataclass

from tokenizers import Tokenizer

from calm_core.tokens.tokenizer import end_of_text_id, template_ids


@dataclass(frozen=True)
class DocumentMarks:
    """Token ids before and after each document."""

    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()


def end_of_text_marks(tokenizer: Tokenizer) -> DocumentMarks:
    """An end-of-text token after each document."""
    return DocumentMarks(after=(end_of_text_id(tokenizer),))


def post_processor_marks(tokenizer: Tokenizer) -> DocumentMarks:
    """What the post-processor of ``tokenizer`` puts around a text; where that is nothing, ``end_of_text_marks``."""
    marks = DocumentMarks(*template_ids(tokenizer))
    return marks if marks != DocumentMarks() else end_of_text_marks(tokenizer)
