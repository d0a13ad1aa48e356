"""The tokenizer as other programs, transformers above all, expect it: tokenizer_config.json, and a template.

Notable: a text gets the token ids there that it gets here: text that spells a special token is text.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from calm_core.tokens.document_marks import document_marks, told_kind
from calm_core.tokens.tokenizer import PAD, end_of_text_id, is_template_name, template_ids

TOKENIZER_CONFIG = "tokenizer_config.json"


def tokenizer_config(
    tokenizer: Tokenizer, context_tokens: int | None = None, opening: Sequence[int] = ()
) -> dict[str, Any]:
    """The content of tokenizer_config.json for ``tokenizer``, of a model that reads ``context_tokens`` tokens.

    ``opening`` is what stands before the model's prompts (``tokens.openings``); of several tokens nothing is said.
    """
    config: dict[str, Any] = {
        # The name since version 3; version 5 takes it for its TokenizersBackend.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": tokenizer.id_to_token(end_of_text_id(tokenizer)),
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
    }
    if len(opening) == 1:
        config["bos_token"] = tokenizer.id_to_token(opening[0])
    if tokenizer.token_to_id(PAD) is not None:
        config["pad_token"] = PAD
    if context_tokens is not None:
        config["model_max_length"] = context_tokens
    return config


def with_opening(tokenizer: Tokenizer, opening: Sequence[int]) -> Tokenizer:
    """A copy of ``tokenizer`` that puts the one token of ``opening`` before a text where special tokens are asked for.

    Without a single such token, or where templates cannot write it, it is a copy as it is.
    """
    copy = Tokenizer.from_str(tokenizer.to_str())
    first = tokenizer.id_to_token(opening[0]) if len(opening) == 1 else None
    if first is not None and is_template_name(first):
        copy.post_processor = TemplateProcessing([first, "$A"], special_tokens=[(first, opening[0])])
    return copy


def prompt_opening(config: Mapping[str, Any], folder: Path, tokenizer: Tokenizer) -> Sequence[int]:
    """The token ids with which prompts of the language model in ``folder`` begin there; ``config`` is its config.json.

    They are those of the tokenizer's own template where the model's documents are marked by it.
    """
    marks = document_marks(told_kind(config, folder / "config.json"), tokenizer)
    return marks.before or config.get("opening") or ()


def opening_of(tokenizer: Tokenizer) -> list[int] | None:
    """The one token that the template of ``tokenizer`` puts before a text; None where it puts none or several."""
    before, _ = template_ids(tokenizer)
    return list(before) if len(before) == 1 else None
