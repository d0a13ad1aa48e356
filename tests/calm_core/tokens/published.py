"""Small tokenizers that are put together as published ones are."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

TEXT = "The quick brown fox  jumps\n\tover Ünïcode 😀 漢字 over the lazy dog, isn't it? 5:30"

# As in Llama 3: letters with what stands before them, digits in threes, punctuation, white space.
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def byte_level(*special: str, prefix_space: bool = False, pre_tokenizer: Any = None) -> Tokenizer:
    """A byte-level BPE of 300 entries, as GPT-2's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT] * 5, trainer)
    return tokenizer


def _llama_3() -> Tokenizer:
    """Special tokens that the model itself does not have, and a template that begins a text."""
    split = pre_tokenizers.Split(Regex(_WORDS), "isolated")
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer = byte_level(pre_tokenizer=pre_tokenizers.Sequence([split, bytes_]))
    tokenizer.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>", "<|reserved|>", "<|eot_id|>"])
    begin = ("<|begin_of_text|>", 300)
    template = processors.TemplateProcessing("<|begin_of_text|> $A", special_tokens=[begin])
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(), template])
    return tokenizer


def _roberta() -> Tokenizer:
    """A space before each text, a mask that takes the spaces before it, a template of <s> and </s>."""
    tokenizer = byte_level("<s>", "<pad>", "</s>", "<unk>", "<mask>", prefix_space=True)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    tokenizer.add_tokens([AddedToken("<mask>", lstrip=True, special=False)])
    return tokenizer


def _qwen() -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return tokenizer


def _uncased() -> Tokenizer:
    tokenizer = byte_level("<pad>", "<eos>")
    tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


def _without_decoder() -> Tokenizer:
    values = json.loads(byte_level("<pad>", "<eos>").to_str())
    return Tokenizer.from_str(json.dumps(values | {"decoder": None}))


def _bert() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([TEXT] * 5, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return tokenizer


def _t5() -> Tokenizer:
    """SentencePiece's Unigram: a space before each text, that the decoder takes away."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=60, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator([TEXT] * 100, trainer)
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    return tokenizer


def _llama_2() -> Tokenizer:
    """SentencePiece's BPE with bytes for what it does not know: a normalizer puts a space before each text."""
    vocabulary = {name: token_id for token_id, name in enumerate(["<unk>", "<s>", "</s>"])}
    vocabulary |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    vocabulary |= {name: 259 + place for place, name in enumerate(["▁", "H", "e", "t", "▁H", "▁He", "▁t", "He"])}
    model = models.BPE(
        vocabulary,
        [("▁", "H"), ("▁H", "e"), ("▁", "t"), ("H", "e")],
        unk_token="<unk>",
        byte_fallback=True,
        fuse_unk=True,
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


PUBLISHED: dict[str, Callable[[], Tokenizer]] = {
    "gpt-2": lambda: byte_level("<|endoftext|>"),
    "llama-3": _llama_3,
    "llama-2": _llama_2,
    "roberta": _roberta,
    "qwen": _qwen,
    "bert": _bert,
    "t5": _t5,
    "uncased": _uncased,
    "without decoder": _without_decoder,
}


def write(tokenizer: Tokenizer, folder: Path, **changes: Any) -> Path:
    """The tokenizer.json of ``tokenizer`` in ``folder``, with ``changes`` at its top level."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(tokenizer.to_str()) | changes), encoding="utf-8")
    return path
