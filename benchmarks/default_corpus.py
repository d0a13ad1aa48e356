"""The beginning of the run's own corpus, tokenised and encoded as the stages do it, in a temporary folder.

Of params.yaml's corpus these are the first ``DOCUMENTS``: 7.6 MB of botocore's documentation, 1.8 M tokens. The
autoencoder has its shape there and random weights, which speed does not depend on.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import NamedTuple

from calm_core.autoencoder.model import Autoencoder
from calm_core.autoencoder.training import autoencoder_config
from calm_core.corpus.tokenise import tokenise
from calm_core.params import Params
from calm_core.runtime.randomness import generator
from calm_core.tokens.shards import TokenStream

DOCUMENTS = 60_000


class DefaultCorpus(NamedTuple):
    """What the benchmarks of the data stages begin with."""

    params: Params
    """params.yaml with as many documents, and with the tokenizer trained on them."""
    folder: Path
    """Where there is room for outputs."""
    train: TokenStream
    autoencoder: Autoencoder


@contextmanager
def default_corpus(params: Params, documents: int = DOCUMENTS) -> Iterator[DefaultCorpus]:
    """The first ``documents`` of the corpus of ``params`` while the block runs."""
    with tempfile.TemporaryDirectory(prefix="benchmarks-") as name:
        folder = Path(name)
        tokens = folder / "tokens"
        tokens.mkdir()
        # So few documents are of some services alone, and a split could be without any.
        changes = {"documents": documents, "split_by": "document"}
        params = params.model_copy(update={"corpus": params.corpus.model_copy(update=changes)})
        with redirect_stderr(StringIO()):
            vocabulary_size = tokenise(params, tokens)["vocabulary_size"]
        trained = {"path": str(tokens / "tokenizer.json"), "vocabulary_size": vocabulary_size}
        params = params.model_copy(update={"tokenizer": params.tokenizer.model_copy(update=trained)})
        autoencoder = Autoencoder(autoencoder_config(params.autoencoder, vocabulary_size))
        autoencoder.initialise(generator(0, "benchmarks"))
        autoencoder.eval().requires_grad_(False)
        yield DefaultCorpus(params, folder, TokenStream(tokens, "train"), autoencoder)
