"""The byte-level BPE tokenizer: trained on the corpus, or any tokenizer.json.

Byte-level, so every text has an encoding and decoding gives it back. Two special tokens: "<pad>" has id 0,
which is what token dropout puts in the place of a dropped token (paper, section 2), and "<eos>" ends a document. Text
that happens to hold these names is text: it ends no document.

A tokenizer.json from elsewhere is read without the settings that would change a text (settings.py); what it cannot give
back in spite of that is told before work begins (round_trip.py).
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Encoding, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from calm_core.errors import CalmError, one_line
from calm_core.tokens.settings import place_added_tokens, switch_off

PAD, END_OF_TEXT = "<pad>", "<eos>"

TOKENIZER = "tokenizer.json"

LARGEST_VOCABULARY = 1 << 24
"""Entries, at most; as tokenizer.vocabulary_size and the models have it."""

# Names that published tokenizers give to the end of a document.
_END_OF_TEXT_NAMES = (
    END_OF_TEXT,
    "<|end_of_text|>",
    "<|endoftext|>",
    "</s>",
    "[SEP]",
    "[EOS]",
    "<|eos|>",
    "<EOS>",
    "<｜end▁of▁sentence｜>",
)


def train_tokenizer(texts: Iterable[str], vocabulary_size: int) -> Tokenizer:
    """Train a byte-level BPE of ``vocabulary_size`` entries, special tokens and the 256 bytes included."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[PAD, END_OF_TEXT],
        # All 256 bytes, also those that the sample lacks: any text can then be encoded.
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # A switch of the running tokenizer that tokenizer.json does not hold: ``parse_tokenizer`` sets it again.
    tokenizer.encode_special_tokens = True
    return tokenizer


def load_tokenizer(path: Path) -> Tokenizer:
    """Read a tokenizer.json, or that of a folder, such as one downloaded from a hub.

    Raises:
        CalmError: it is missing or damaged, its ids contradict each other, or it knows no end of a document.
    """
    path = tokenizer_file(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CalmError(f"{path} cannot be read: {error.strerror}") from None
    return parse_tokenizer(content, path)


def tokenizer_file(path: Path) -> Path:
    """The tokenizer.json that ``path`` names: itself, or in that folder; raises CalmError where there is none."""
    try:
        path = path.expanduser()
        folder = path if path.is_dir() else path.parent
        found = folder / TOKENIZER if path.is_dir() else path
        if found.is_file() and not _is_other_format(found):
            return found
        others = [name for name in ("tokenizer.model", "vocab.json", "vocab.txt") if (folder / name).is_file()]
    except (OSError, RuntimeError):  # a name that is too long; a home that is not known
        found, others = path, []
    if others:
        raise CalmError(
            f"{found} is no tokenizer.json, {folder / others[0]} is of another format; convert it: "
            f"transformers.AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
        )
    raise CalmError(
        f"tokenizer {found} is missing; name a tokenizer.json or its folder (a name on a hub is not fetched), or set "
        "tokenizer.path to '' and tokenizer.document_marks to end_of_text to train one"
    )


def _is_other_format(path: Path) -> bool:
    return path.name in ("tokenizer.model", "vocab.json", "vocab.txt", "merges.txt")


def parse_tokenizer(content: bytes, path: Path) -> Tokenizer:
    """The tokenizer of the ``content`` of the tokenizer.json ``path``; errors as in ``load_tokenizer``."""
    try:
        values = json.loads(content)
        if not isinstance(values, dict) or not isinstance(values.get("model"), dict):
            raise ValueError("a JSON object with a model is needed")
        # As it is where nothing has to change, which is faster; the library takes no byte order mark.
        as_it_is = not switch_off(values) and content.startswith(b"{")
        tokenizer = Tokenizer.from_buffer(content) if as_it_is else Tokenizer.from_str(json.dumps(values))
        if _misplaced(tokenizer, values) and place_added_tokens(values):
            tokenizer = Tokenizer.from_str(json.dumps(values))
    except BaseException as error:
        _require_librarys(error)
        raise CalmError(f"{path} is no tokenizer.json: {one_line(error)}") from None
    if wrong := _misplaced(tokenizer, values):
        raise CalmError(f"{path}: added_tokens and model.vocab contradict each other: {wrong}")
    _require_one_token_an_id(tokenizer, path)
    _settle_end_of_text(tokenizer, path)
    tokenizer.encode_special_tokens = True  # despite its name: names of special tokens in a text are encoded as text
    return tokenizer


def vocabulary_size_of(tokenizer: Tokenizer) -> int:
    """How many rows an embedding needs: the largest id + 1, since a vocabulary may have holes."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def require_fit(tokenizer: Tokenizer, rows: int, name: str) -> None:
    """Raise CalmError unless a model with ``rows`` rows in its embedding goes with the tokenizer called ``name``.

    More rows than ids are fine for the [PAD] that the reference implementation adds, and up to a multiple of 64, as
    many round them up for speed; far more say that the tokenizer is another model's.
    """
    size = vocabulary_size_of(tokenizer)
    rounded = rows % 64 == 0 and 0 <= rows - size <= max(127, rows // 32)
    if rows - size not in (0, 1) and not rounded:
        raise CalmError(
            f"{name} has {size:,} token ids, the model {rows:,} rows; the model's own tokenizer is needed (allowed is "
            "1 row more, or as many as round them up to a multiple of 64)"
        )


def encode_texts(tokenizer: Tokenizer, texts: list[str]) -> list[Encoding]:
    """The tokens of each of ``texts``, without special ones.

    Raises:
        CalmError: a vocabulary of words or characters lacks one and has no token for that.
    """
    try:
        # The fast variant computes no character offsets, which nobody here uses.
        return list(tokenizer.encode_batch_fast(texts, add_special_tokens=False))
    except BaseException as error:
        _require_librarys(error)
        if len(texts) > 1:
            for text in texts:
                encode_texts(tokenizer, [text])
        raise CalmError(
            f"the tokenizer cannot encode {texts[0][:60]!r}: {one_line(error)}; a byte-level BPE encodes every text"
        ) from None


def end_of_text_id(tokenizer: Tokenizer) -> int:
    """Id of the token that ends a document; raises CalmError if the vocabulary has none."""
    if (appended := _appended(tokenizer)) is not None:
        return appended
    for name in _END_OF_TEXT_NAMES:
        if (token_id := tokenizer.token_to_id(name)) is not None:
            return token_id
    raise CalmError(f"the tokenizer has no end-of-text token; it needs one of {', '.join(_END_OF_TEXT_NAMES)}")


def _require_librarys(error: BaseException) -> None:
    """Raise ``error`` again unless it is the library's: a bare Exception, or a panic of Rust's, which is none."""
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        raise error


def template_ids(tokenizer: Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ids of the special tokens that the tokenizer's own template puts before a text and after it."""
    if tokenizer.post_processor is None:
        return (), ()
    try:
        encoding = tokenizer.encode("a")
    except BaseException as error:  # a vocabulary without that letter, a template without its tokens
        _require_librarys(error)
        return (), ()
    # The mask is 1 for what the template put there.
    mask = encoding.special_tokens_mask
    if 0 not in mask:
        return (), ()
    first, end = mask.index(0), len(mask) - mask[::-1].index(0)
    return tuple(encoding.ids[:first]), tuple(encoding.ids[end:])


def _appended(tokenizer: Tokenizer) -> int | None:
    """Id of the one token that the tokenizer's own template puts after a text, as those of BERT and T5 do."""
    _, after = template_ids(tokenizer)
    return after[0] if len(after) == 1 else None


def _settle_end_of_text(tokenizer: Tokenizer, path: Path) -> None:
    """Make the marks of a document special tokens, and its end one that tokenizer.json alone tells.

    A vocabulary may have several of the usual names, or another one: then the files beside it decide.
    """
    named = [name for name in _END_OF_TEXT_NAMES if tokenizer.token_to_id(name) is not None]
    if _appended(tokenizer) is None:
        known = named or tokenizer.get_vocab()
        chosen = next((name for name in _names_beside(tokenizer, path) if name in known), None)
        if chosen and named[:1] != [chosen]:
            # Saved with the tokenizer, as BERT's own template is, it lasts where the files beside it are left behind.
            # What the template has before a text, a BOS, stays there.
            names = [tokenizer.id_to_token(token_id) or "" for token_id in template_ids(tokenizer)[0]]
            before = [name for name in names if is_template_name(name)]
            marks = [(name, tokenizer.token_to_id(name)) for name in dict.fromkeys([*before, chosen])]
            tokenizer.post_processor = processors.TemplateProcessing([*before, "$A", chosen], special_tokens=marks)
    try:
        token_id = end_of_text_id(tokenizer)
    except CalmError as error:
        raise CalmError(f"{path}: {error}, or eos_token in a tokenizer_config.json beside it") from None
    # A token that is only added would be found in texts, and end documents, or begin them, in their middle.
    first, last = template_ids(tokenizer)
    added = tokenizer.get_added_tokens_decoder()
    for mark in dict.fromkeys((token_id, *first, *last)):
        if (token := added.get(mark)) is not None and not token.special:
            tokenizer.add_special_tokens([token.content])


def _names_beside(tokenizer: Tokenizer, path: Path) -> list[str]:
    """What tokenizer_config.json and config.json beside a tokenizer.json call the end of a text."""
    token = _read(path.with_name("tokenizer_config.json")).get("eos_token")
    token_id = _read(path.with_name("config.json")).get("eos_token_id")
    names = [
        token.get("content") if isinstance(token, dict) else token,
        tokenizer.id_to_token(token_id) if type(token_id) is int and 0 <= token_id < LARGEST_VOCABULARY else None,
    ]
    return [name for name in names if isinstance(name, str) and is_template_name(name)]


def is_template_name(name: str) -> bool:
    """Whether the library's templates have a way to write ``name``."""
    return bool(name) and ":" not in name and not name.startswith("$")


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):  # evidence that is welcome, not needed
        return {}
    return values if isinstance(values, dict) else {}


def _misplaced(tokenizer: Tokenizer, values: dict[str, Any]) -> str:
    """The first added token that has another id than the tokenizer.json ``values`` says, in words."""
    for token in values.get("added_tokens") or []:
        if (found := tokenizer.token_to_id(token["content"])) != token["id"]:
            return f"{token['content']!r} has id {token['id']} there, {found} here"
    return ""


def _require_one_token_an_id(tokenizer: Tokenizer, path: Path) -> None:
    tokens: dict[int, str] = {}
    for name, token_id in tokenizer.get_vocab().items():
        if (other := tokens.setdefault(token_id, name)) != name:
            first, second = sorted((other, name))
            raise CalmError(f"{path}: id {token_id} stands for both {first!r} and {second!r}; give each its own")
    if tokens and (largest := max(tokens)) >= LARGEST_VOCABULARY:
        raise CalmError(f"{path}: {tokens[largest]!r} has id {largest:,}; ids below {LARGEST_VOCABULARY:,} are allowed")
