"""BrierLM of any model folder on any corpus: text in, tokens by the model's own tokenizer, scores a document out."""

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import botocore
import polars as pl

from calm_core.calm.model import Calm
from calm_core.corpus.documents import documents
from calm_core.errors import CalmError
from calm_core.evaluation.brier import SCORES, by_document
from calm_core.evaluation.brierlm import cross_entropy, evaluate_calm, evaluate_transformer
from calm_core.evaluation.intervals import estimate_brierlm
from calm_core.inference.language_model import LanguageModel
from calm_core.params import CorpusParams
from calm_core.runtime.progress import progress
from calm_core.runtime.randomness import generator
from calm_core.storage.atomic import whole_directory
from calm_core.storage.checksum import sha256
from calm_core.storage.json_io import write_json
from calm_core.storage.provenance import DESCRIPTION
from calm_core.tokens.batch_encoding import EncodedDocuments, encode_documents
from calm_core.tokens.blocks import EvaluationBlocks
from calm_core.tokens.document_marks import document_marks, kind_of_tokens
from calm_core.tokens.round_trip import told_changes
from calm_core.tokens.shards import TokenStream, TokenWriter

BATCH_TOKENS = 1024
"""Tokens that go through a model together, one block at least."""

BEGINNING = 80
"""Characters of each document that the table of documents shows."""

BOOTSTRAP_RESAMPLES = 1000

SCORES_FILE, DOCUMENTS = "brierlm.json", "documents.parquet"

UNFINISHED = "blocks.json"
"""What an evaluation that can be resumed has so far, see ``reference_protocol``."""


@dataclass(frozen=True)
class Settings:
    """What is measured, and how much of it."""

    samples: int = 2
    """Continuations a position, 2 or more."""
    tokens: int | None = None
    """Most tokens of the corpus to look at; None for all."""
    context_tokens: int | None = None
    """Length of a block; None for the context that the model was trained with."""
    every: int = 4
    """A Transformer is asked after every so many tokens; a CALM after every patch."""
    seed: int = 0


def parse_corpus(spec: str, text_field: str = "text") -> CorpusParams:
    """The corpus that ``spec`` names: a path or glob of text, JSON-lines or Parquet files, "botocore", or a dataset.

    A dataset of the Hugging Face hub is "hf:NAME", "hf:NAME:CONFIGURATION" or "hf:NAME:CONFIGURATION:SPLIT", split
    "test" if none is named.
    """
    source, paths, dataset, configuration, split = "files", [spec], "", "", "test"
    if spec == "botocore":
        source, paths = "botocore", []
    elif spec.startswith("hf:"):
        source, paths = "huggingface", []
        dataset, configuration, split, *rest = [*spec.removeprefix("hf:").split(":"), *([""] * 3)][:4]
        split = split or "test"
        if not dataset or any(rest):
            raise CalmError(f"corpus {spec!r}: a dataset is named hf:NAME[:CONFIGURATION[:SPLIT]]")
    return CorpusParams(
        source=source,  # type: ignore[arg-type]
        botocore_version=botocore.__version__,
        paths=paths,
        dataset=dataset,
        configuration=configuration,
        dataset_split=split,
        text_field=text_field,
        text_unit="document",
        documents=None,
        # Not used: all documents are evaluated.
        split_by="document",
        validation_percent=25.0,
        test_percent=25.0,
        deduplicate=False,
    )


def evaluate_corpus(
    language_model: LanguageModel, spec: str, folder: Path, settings: Settings, text_field: str = "text"
) -> dict[str, Any]:
    """Score a model on the corpus ``spec`` and write ``folder``/brierlm.json and documents.parquet; returns the former.

    ``spec`` is that of ``parse_corpus``, or a folder that the stage tokenise wrote, whose test split it then is.

    Raises:
        CalmError: the corpus cannot be read, is shorter than one block, or was tokenised for another model; ``folder``
            holds something else.
    """
    require_free(folder)
    with corpus_tokens(language_model, spec, text_field, settings.tokens) as (tokens, beginnings):
        table, results = _score(language_model, tokens, settings)
    results = {"corpus": spec, **results}
    write_results(folder, table, beginnings, results)
    return results


@contextmanager
def corpus_tokens(
    language_model: LanguageModel, spec: str, text_field: str, limit: int | None
) -> Iterator[tuple[TokenStream, list[str]]]:
    """The tokens of the corpus ``spec``, as ``evaluate_corpus`` takes it, and how each document begins.

    They are in a temporary folder, so as far as a ``limit`` of tokens needs them; of a folder of tokens no beginnings
    are known. Errors as in ``evaluate_corpus``.
    """
    if (Path(spec) / DESCRIPTION).is_file():
        yield _tokenised(Path(spec), language_model), []
        return
    with tempfile.TemporaryDirectory() as temporary:
        texts = documents(parse_corpus(spec, text_field))
        beginnings = _write_tokens(language_model, texts, Path(temporary), limit)
        yield TokenStream(Path(temporary), "evaluated"), beginnings


def write_results(folder: Path, table: pl.DataFrame, beginnings: list[str], results: dict[str, Any]) -> None:
    """Replace ``folder`` by ``results`` and ``table``: sums of scores by document, of which means are written."""
    table = table.with_columns(pl.col(SCORES) / pl.col("positions"))
    if beginnings:
        begins = pl.DataFrame({"document": range(len(beginnings)), "begins": beginnings})
        table = table.join(begins, on="document", maintain_order="left")
    with whole_directory(folder) as fresh:
        with (fresh / DOCUMENTS).open("wb") as file:  # polars takes no name that is not UTF-8
            table.write_parquet(file)
        write_json(fresh / SCORES_FILE, results)


def require_free(folder: Path) -> None:
    """Raise CalmError unless ``folder`` is new, or holds results of an evaluation, finished or not, and nothing else.

    What stands there is replaced in the end: it must not be the user's models or texts.
    """
    place = folder.resolve()
    if not place.exists():
        return
    own = {SCORES_FILE, DOCUMENTS, UNFINISHED, f".{UNFINISHED}.new"}  # the last of a process killed while it wrote
    if not place.is_dir() or {path.name for path in place.iterdir()} - own:
        raise CalmError(f"{folder} holds something else than results of an evaluation; name another folder")
    if place == Path.cwd():
        raise CalmError(f"{folder} is the folder that calm works in; name another one")


def _score(
    language_model: LanguageModel, tokens: TokenStream, settings: Settings
) -> tuple[pl.DataFrame, dict[str, Any]]:
    context = settings.context_tokens or language_model.context_tokens
    model, limit = language_model.model, settings.tokens or len(tokens)
    blocks = EvaluationBlocks(tokens, context, max(1, BATCH_TOKENS // context), limit, settings.seed)
    results: dict[str, Any] = {}
    if isinstance(model, Calm):
        if context % model.config.patch_size:
            raise CalmError(f"a context of {context} tokens is no multiple of the model's K, {model.config.patch_size}")
        table = evaluate_calm(model, language_model.autoencoder, blocks, settings.samples)
    else:
        if settings.every > context:
            raise CalmError(f"a block of {context} tokens has no place to ask after every {settings.every} tokens")
        table = evaluate_transformer(model, blocks, settings.every, settings.samples)
        results["cross_entropy_nats"] = cross_entropy(model, blocks)
    table = by_document(table)
    score = estimate_brierlm([table], BOOTSTRAP_RESAMPLES, generator(settings.seed, "evaluate", "bootstrap"))
    return table, {
        **score._asdict(),
        **results,
        "context_tokens": context,
        "samples": settings.samples,
        "seed": settings.seed,
        "device": language_model.device.type,
    }


def _write_tokens(language_model: LanguageModel, texts: Iterator[str], folder: Path, limit: int | None) -> list[str]:
    """Write the token ids of ``texts`` as shards, as far as they are needed; returns how each document begins."""
    writer = TokenWriter(folder, "evaluated", language_model.model.config.vocabulary_size)
    beginnings: list[str] = []
    with progress("tokenise", None, "documents") as advance:
        encoded = _told(
            language_model, encode_documents(language_model.tokenizer, texts, language_model.document_marks)
        )
        for text, token_ids in (document for batch in encoded for document in batch.documents()):
            writer.write(token_ids)
            beginnings.append(" ".join(text[: 2 * BEGINNING].split())[:BEGINNING])
            advance()
            if limit and writer.tokens > limit + BATCH_TOKENS:
                break  # of a large corpus only what is evaluated is tokenised
    writer.flush()
    return beginnings


def _told(language_model: LanguageModel, batches: Iterator[EncodedDocuments]) -> Iterator[EncodedDocuments]:
    """``batches`` as they are; where the tokenizer changes the first texts, that is told on standard error."""
    for number, batch in enumerate(batches):
        if number == 0 and (told := told_changes(language_model.tokenizer, batch.texts)):
            print(f"tokenise: {told}", file=sys.stderr, flush=True)
        yield batch


def _tokenised(folder: Path, language_model: LanguageModel) -> TokenStream:
    """The test split in ``folder``, which has to be of the model's own tokenizer."""
    with tempfile.NamedTemporaryFile(suffix=".json") as own:
        language_model.tokenizer.save(own.name)
        if sha256(Path(own.name)) != sha256(folder / "tokenizer.json"):
            raise CalmError(f"{folder} was made by another tokenizer than the model's; evaluate on its text instead")
    if language_model.document_marks != document_marks(kind := kind_of_tokens(folder), language_model.tokenizer):
        raise CalmError(f"{folder} has documents marked by {kind}, unlike the model's; evaluate on its text instead")
    return TokenStream(folder, "test")
