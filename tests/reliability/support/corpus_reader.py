"""A process that reads corpora for a test: a crash of a library or a lack of memory is seen, and ends nothing else."""

import multiprocessing
import platform
import traceback
from multiprocessing.connection import Connection
from typing import Any

from calm_core.corpus.documents import documents
from calm_core.errors import CalmError
from calm_core.params import CorpusParams
from calm_core.tokens.tokenizer import train_tokenizer
from tests.reliability.support.faults import limit_memory

MEMORY = 1 << 30
SECONDS = 30


class CorpusReader:
    """Reads one corpus after the other in a process that may take ``MEMORY`` bytes beside what it starts with.

    That limit is Linux's. If the process dies or hangs, that is a failed assertion, and there is a new one for the next
    corpus.
    """

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        self._ours, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()

    def read(self, corpus: CorpusParams) -> list[str] | str:
        """The documents of ``corpus``, or the line in which it is refused; anything else is a failed assertion."""
        self._ours.send(corpus.model_dump())
        try:
            how, what = self._ours.recv() if self._ours.poll(SECONDS) else ("failed", "still at work")
        except EOFError:
            self._process.join()
            how, what = "failed", f"the process died of signal {-(self._process.exitcode or 0)}"
        if how == "failed":
            self.end()
            self._start()
        assert how in ("read", "refused"), what
        return what

    def end(self) -> None:
        self._process.kill()
        self._process.join()


def _work(pipe: Connection) -> None:
    tokenizer = train_tokenizer(["some words to learn merges from, and some words more"] * 3, 300)
    if platform.system() == "Linux":
        limit_memory(MEMORY)
    while True:
        corpus = CorpusParams.model_validate(pipe.recv())
        answer: tuple[str, Any]
        try:
            texts = list(documents(corpus))
            for text in texts:
                assert isinstance(text, str)
                assert text.strip()
                assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids) == text
            answer = "read", texts
        except CalmError as error:
            answer = "refused", str(error)
        except BaseException:
            answer = "failed", traceback.format_exc()
        pipe.send(answer)
