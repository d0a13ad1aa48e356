"""A trained model as others use it: one call loads its folder, methods continue text (docs/api.md)."""

from collections import Counter, deque
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from tokenizers import Tokenizer

from calm_core.autoencoder.model import Autoencoder
from calm_core.calm.folder import load_calm
from calm_core.calm.model import Calm
from calm_core.errors import CalmError
from calm_core.inference.decoding import (
    Prompts,
    SamplerName,
    Sampling,
    align_prompts,
    calm_steps,
    transformer_steps,
)
from calm_core.inference.text_stream import TextStream, stop_texts, text_after
from calm_core.runtime.device import DeviceName, choose_device, device_of
from calm_core.runtime.randomness import generator
from calm_core.runtime.row_generators import RowGenerators
from calm_core.storage.hub import local_folder
from calm_core.storage.model_folder import AUTOENCODER, load_model, read_config
from calm_core.tokens.document_marks import DocumentMarks, document_marks, end_of_text_marks, told_kind
from calm_core.tokens.tokenizer import TOKENIZER, encode_texts, end_of_text_id, load_tokenizer, require_fit
from calm_core.transformer.model import Transformer

BATCH_PROMPTS = 16
"""Prompts that go on together."""


FinishReason = Literal["length", "end_of_text", "stop"]


@dataclass
class Continuation:
    """What a model wrote after one prompt."""

    token_ids: list[int] = field(default_factory=list)
    """The fewest tokens that hold the text: the last one may go on into the stop text that ended it."""
    finish_reason: FinishReason | None = None
    """None while the text goes on."""
    draws: int = 0
    """Samples that the head drew for it, or tokens of a Transformer."""
    inexact_steps: int = 0
    """Steps in which a temperature below 1 was approximated."""
    exact: bool = True
    """Whether each step is from P^(1 / temperature) itself: none was approximated, and no budget chose among them."""
    text: str = field(default="", compare=False)
    """What was written, up to a stop text. While it goes on, what is settled of it, if ``stop`` was given."""


class NumberedPrompt(NamedTuple):
    """A prompt, and which of the texts that follow it is asked for: another number, other draws."""

    prompt: list[int]
    number: int


def numbered(prompts: Sequence[list[int]], texts: int = 1) -> list[NumberedPrompt]:
    """``texts`` of each of ``prompts``, prompt by prompt; all texts of one prompt are numbered from 0 on."""
    counts: Counter[tuple[int, ...]] = Counter()
    found = []
    for prompt in prompts:
        key = tuple(prompt)
        found += [NumberedPrompt(prompt, counts[key] + number) for number in range(texts)]
        counts[key] += texts
    return found


@dataclass(frozen=True)
class LanguageModel:
    """A CALM with the autoencoder of its latents, or a Transformer; with tokenizer and the context of the training."""

    model: Calm | Transformer
    autoencoder: Autoencoder | None
    tokenizer: Tokenizer
    context_tokens: int
    opening: tuple[int, ...] = ()
    """Token ids of a patch that stand before each prompt, the end of another document; none in an imported CALM."""
    marks: DocumentMarks | None = None
    """What stands around each document that the model reads; None for an end-of-text token after it."""

    @property
    def patch_size(self) -> int:
        """Tokens a step: K of a CALM, 1 of a Transformer."""
        return self.model.config.patch_size if isinstance(self.model, Calm) else 1

    @property
    def document_marks(self) -> DocumentMarks:
        """What stands around each document that the model reads."""
        return self.marks or end_of_text_marks(self.tokenizer)

    @property
    def device(self) -> torch.device:
        """Where the weights are, and where texts are sampled."""
        return device_of(self.model)

    def stream(
        self,
        prompts: list[list[int]],
        tokens: int,
        sampling: Sampling,
        seed: int,
        stop: str | Sequence[str] | None = None,
    ) -> Iterator[list[Continuation]]:
        """Continue prompts of token ids by at most ``tokens`` tokens each; yields the same, growing list at each step.

        Of a prompt longer than the context its end is read, see ``read_part``.

        A text is a function of its prompt, of the other arguments and of the kind of device, whose generators draw the
        samples, and not of the prompts beside it, but for rounding: products of a batch of another size may have other
        last digits, and seldom a draw falls between both. A prompt that stands n times gets n texts, the first of
        which it gets alone. A text ends before its end-of-text token, which is left out, or before the token that
        begins the next document, where the model was trained with one; and before the first of the texts ``stop``,
        wherever its tokens begin. With ``stop``, be it empty, each step also says the ``text`` so far.

        Raises:
            CalmError: there is no prompt, ``tokens`` is below 1, the temperature outside (0, 1], a stop text is empty,
                or a prompt holds an id that is not in the vocabulary.
        """
        return self._stream(numbered(prompts), tokens, sampling, seed, stop)

    def _stream(
        self,
        texts: Sequence[NumberedPrompt],
        tokens: int,
        sampling: Sampling,
        seed: int,
        stop: str | Sequence[str] | None,
    ) -> Iterator[list[Continuation]]:
        prompts = [text.prompt for text in texts]
        self._require_possible(prompts, tokens, sampling)
        # A number comes last and prompts hold token ids alone, so no two texts have the same key.
        keys: list[tuple[str | int, ...]] = [("generate", *text.prompt, text.number) for text in texts]
        draws = RowGenerators([generator(seed, *key, device=self.device) for key in keys])
        end_of_text, marks = end_of_text_id(self.tokenizer), self.document_marks
        ends = {end_of_text, *marks.before[:1], *marks.after[:1]}
        # A model that saw no end of text knows nothing of that token, whose embedding is as it was initialised.
        filler = marks.filler
        read = [self.read_part(prompt) for prompt in prompts]
        on_cpu = align_prompts(read, self.patch_size, filler, self.opening)
        aligned = Prompts(*(part.to(self.device) for part in on_cpu))
        if isinstance(self.model, Transformer):
            steps = transformer_steps(self.model, aligned, sampling, draws)
        else:
            steps = calm_steps(self.model, self.autoencoder, aligned, sampling, draws)
        continuations = [Continuation() for _ in prompts]
        stops = None if stop is None else stop_texts(stop)
        written = [None if stops is None else TextStream(self.tokenizer, prompt, stops) for prompt in read]
        for step in islice(steps, -(-tokens // self.patch_size)):
            columns = (step.token_ids, step.draws, step.finished)
            rows = zip(continuations, read, written, *(column.tolist() for column in columns), strict=True)
            for continuation, prompt, text, token_ids, used, finished in rows:
                if continuation.finish_reason is None:
                    _extend(continuation, token_ids, tokens, ends)
                    continuation.draws += used
                    continuation.inexact_steps += not finished
                    continuation.exact &= finished and step.exact
                    if text:
                        _tell(continuation, text)
                    elif continuation.finish_reason:
                        continuation.text = text_after(self.tokenizer, prompt, continuation.token_ids)
            yield continuations
            if all(continuation.finish_reason for continuation in continuations):
                return

    def continuations(
        self,
        prompts: list[list[int]],
        tokens: int,
        sampling: Sampling,
        seed: int,
        stop: str | Sequence[str] | None = None,
        texts: int = 1,
    ) -> Iterator[Continuation]:
        """``texts`` finished continuations of each of any number of prompts, prompt by prompt, a batch at a time.

        The first text of a prompt is the one that ``stream`` gives; the other arguments and errors are those there.
        """
        if texts < 1:
            raise CalmError(f"{texts} continuations of a prompt are asked for; 1 or more are needed")
        if prompts:  # before a text is written, also of what only later batches hold
            self._require_possible(prompts, tokens, sampling)
        asked = numbered(prompts, texts)
        for first in range(0, len(asked), BATCH_PROMPTS):
            yield from deque(self._stream(asked[first : first + BATCH_PROMPTS], tokens, sampling, seed, stop), 1)[0]

    def generate(
        self,
        prompts: list[str],
        *,
        tokens: int = 64,
        temperature: float = 1.0,
        sampler: SamplerName = "batch",
        seed: int = 0,
        stop: str | Sequence[str] = (),
        continuations: int = 1,
    ) -> list[str]:
        """What follows each of ``prompts``, at most ``tokens`` tokens (1 or more) and up to the first of ``stop``.

        ``continuations`` independent texts of each, prompt by prompt; the first is the one that it gets without others.
        Errors as in ``stream``, but that without prompts there are no texts.
        """
        encoded = [self.encode(prompt) for prompt in prompts]
        sampling = Sampling(temperature, sampler)
        finished = self.continuations(encoded, tokens, sampling, seed, stop_texts(stop) or None, continuations)
        return [continuation.text for continuation in finished]

    def read_part(self, prompt: list[int]) -> list[int]:
        """The tokens of ``prompt`` that are read: its last ones, as many as fit with the opening into a context.

        Farther apart than in training, two positions say nothing that a model has learnt; and reading takes time that
        grows with the square of the length.
        """
        return prompt[-max(self.patch_size, self.context_tokens - self.patch_size) :]

    def encode(self, text: str) -> list[int]:
        """The token ids of ``text`` as a prompt: the start of a document, with what stands before one, if anything."""
        return [*self.document_marks.before, *encode_texts(self.tokenizer, [text])[0].ids]

    def decode(self, token_ids: list[int]) -> str:
        """The text of ``token_ids``."""
        return self.tokenizer.decode(token_ids, skip_special_tokens=False)

    def _require_possible(self, prompts: list[list[int]], tokens: int, sampling: Sampling) -> None:
        if tokens < 1 or not prompts:
            raise CalmError(f"{tokens} tokens after {len(prompts)} prompts are asked for; 1 or more of each are needed")
        if not 0 < sampling.temperature <= 1:
            raise CalmError(f"temperature is {sampling.temperature}; allowed is 0 < temperature <= 1")
        size = self.model.config.vocabulary_size
        largest = max((max(prompt, default=0) for prompt in prompts), default=0)
        if largest >= size:
            raise CalmError(f"a prompt holds token {largest}, but the model knows {size}: another model's tokenizer?")


def load_language_model(folder: str | Path, device: DeviceName | torch.device = "cpu") -> LanguageModel:
    """The CALM or the Transformer in ``folder``, such as models/calm, on ``device``; "auto" is the best that there is.

    ``folder`` may also be OWNER/NAME or OWNER/NAME@REVISION on the Hugging Face hub, see ``storage.hub``.

    Raises:
        CalmError: the folder is missing, incomplete or damaged, holds no language model, or has no tokenizer; the hub
            does not give the model; there is no such device.
    """
    place = device if isinstance(device, torch.device) else choose_device(device, "device")
    folder = local_folder(folder)
    config = read_config(folder)
    kind = config["kind"]
    model: Calm | Transformer
    autoencoder: Autoencoder | None = None
    if kind == "calm":
        model, autoencoder = load_calm(folder)
    elif kind == "transformer":
        model = load_model(Transformer, folder)
    else:
        raise CalmError(f"{folder} holds a model of kind {kind!r}; a language model is of kind 'calm' or 'transformer'")
    if config["context_tokens"] is None:
        raise CalmError(f"{folder}/config.json does not say the context that the model was trained with")
    if not (folder / TOKENIZER).is_file():
        raise CalmError(
            f"tokenizer {folder / TOKENIZER} is missing; the one that the model was trained with belongs there "
            "(`calm import-checkpoint` takes it as --tokenizer)"
        )
    tokenizer = load_tokenizer(folder / TOKENIZER)
    require_fit(tokenizer, model.config.vocabulary_size, str(folder / TOKENIZER))
    _require_tokens_of_autoencoder(tokenizer, folder)
    opening = _opening(folder, config.get("opening"), model)
    marks = document_marks(told_kind(config, folder / "config.json"), tokenizer)
    if autoencoder is not None:
        autoencoder.to(place)
    return LanguageModel(model.to(place).eval(), autoencoder, tokenizer, config["context_tokens"], opening, marks)


def _opening(folder: Path, opening: Any, model: Calm | Transformer) -> tuple[int, ...]:
    if opening is None:
        return ()
    patch_size = model.config.patch_size if isinstance(model, Calm) else 1
    vocabulary = range(model.config.vocabulary_size)
    whole = isinstance(opening, list) and len(opening) == patch_size
    if not whole or not all(type(token_id) is int and token_id in vocabulary for token_id in opening):
        raise CalmError(f"{folder}/config.json is damaged: opening is {opening!r}, not {patch_size} token ids")
    return tuple(opening)


def _require_tokens_of_autoencoder(tokenizer: Tokenizer, folder: Path) -> None:
    """Raise CalmError if a CALM's tokenizer was replaced by one of the same size: its autoencoder's is still there."""
    own, inner = folder / TOKENIZER, folder / AUTOENCODER / TOKENIZER
    if not inner.is_file() or inner.read_bytes() == own.read_bytes():
        return
    if load_tokenizer(inner).get_vocab() != tokenizer.get_vocab():
        raise CalmError(f"{own} has other tokens than {inner}; copy the one that the model was trained with over both")


def _tell(continuation: Continuation, text: TextStream) -> None:
    """Bring the text of ``continuation`` up to its tokens, and end both at a stop text."""
    text.read(continuation.token_ids)
    if continuation.finish_reason:
        text.finish()
    if text.stopped:
        continuation.finish_reason = "stop"
        del continuation.token_ids[text.tokens :]
    continuation.text = text.settled


def _extend(continuation: Continuation, token_ids: list[int], tokens: int, ends: Set[int]) -> None:
    for token_id in token_ids:
        if token_id in ends:
            continuation.finish_reason = "end_of_text"
            return
        continuation.token_ids.append(token_id)
        if len(continuation.token_ids) == tokens:
            continuation.finish_reason = "length"
            return
