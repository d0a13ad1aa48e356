"""The byte-level BPE tokenizer: trained on the corpus, or any tokenizer.json.

Byte-level, so every text has an encoding and decoding gives it back. Two special tokens: "<pad>" has id 0,
which is what token dropout puts in the place of a dropped token (paper, section 2), and "<eos>" ends a document. Text
that happens to hold these names is text: it ends no document.
"""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from calm_core.errors import CalmError, one_line

PAD, END_OF_TEXT = "<pad>", "<eos>"

# Names that published tokenizers give to the end of a document.
_END_OF_TEXT_NAMES = (END_OF_TEXT, "<|end_of_text|>", "<|endoftext|>", "</s>", "[SEP]")


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
    # A switch of the running tokenizer that tokenizer.json does not hold: ``load_tokenizer`` sets it again.
    tokenizer.encode_special_tokens = True
    return tokenizer


def load_tokenizer(path: Path) -> Tokenizer:
    """Read a tokenizer.json; raises CalmError if it is missing, damaged or knows no end of a document."""
    try:
        there = path.is_file()
    except OSError:  # a name that is too long
        there = False
    if not there:
        raise CalmError(f"tokenizer {path} is missing; set tokenizer.path to a tokenizer.json, or to '' to train one")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except BaseException as error:  # a bare Exception, or a panic of Rust's, which is not even that
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise CalmError(f"{path} is no tokenizer.json: {one_line(error)}") from None
    end_of_text_id(tokenizer)
    tokenizer.encode_special_tokens = True  # despite its name: names of special tokens in a text are encoded as text
    return tokenizer


def end_of_text_id(tokenizer: Tokenizer) -> int:
    """Id of the token that ends a document; raises CalmError if the vocabulary has none."""
    for name in _END_OF_TEXT_NAMES:
        if (token_id := tokenizer.token_to_id(name)) is not None:
            return token_id
    raise CalmError(f"the tokenizer has no end-of-text token; it needs one of {', '.join(_END_OF_TEXT_NAMES)}")
