"""The trainings of params.yaml alone, and beside one busy process of normal priority a core.

Alone the yardstick is what a training was before its threads worked side by side: each operator on all threads, which
spin where they wait. Beside others it is the same training alone: half is a fair share. Each measurement is a process
of its own, since OpenMP reads how to wait when it is loaded; draws, reading and all of a step are in it.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.measure import Result, median_ratio
from calm_core.runtime.processors import available_processors
from calm_core.runtime.waiting import VARIABLES, wait_asleep

TRAININGS = ("autoencoder", "calm", "transformer")
ROUNDS, SECONDS, WARM_UP = 3, 4.0, 2
VOCABULARY, TOKENS = 4096, 200_000


def busy_machine() -> list[Result]:
    """Two rows a training."""
    rows = []
    for training in TRAININGS:
        pairs = [(_rate(training, spinning=True), _rate(training)) for _ in range(ROUNDS)]
        rows.append(_row(f"{training}: training, alone", "operators on all threads, spinning", pairs, 0.97))
    for training in TRAININGS:
        pairs = []
        for _ in range(ROUNDS):
            alone = _rate(training)
            with _busy_processes(available_processors()):
                pairs.append((alone, _rate(training)))
        rows.append(_row(f"{training}: training, a busy process a core", "itself alone", pairs, 0.45))
    return rows


def _row(name: str, yardstick: str, pairs: list[tuple[float, float]], goal: float) -> Result:
    ratio = median_ratio([(found, expected) for expected, found in pairs])
    details = {"tokens_per_second": [list(pair) for pair in pairs]}
    return Result(name, yardstick, ratio, "of its speed", ">=", goal, details)


def _rate(training: str, spinning: bool = False) -> float:
    """Tokens a second of ``training`` in a process of its own."""
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    if spinning:
        environment["OMP_WAIT_POLICY"] = "ACTIVE"
    command = [sys.executable, "-m", "benchmarks.busy_machine", training, str(int(spinning))]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    if ended.returncode:
        sys.exit(f"{training}: {ended.stderr.strip()}")
    return float(ended.stdout)


@contextmanager
def _busy_processes(count: int) -> Iterator[None]:
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def main(training: str, in_turn: bool) -> float:
    """Tokens a second over ``SECONDS``, after some steps that warm up."""
    # As the stages do, before torch is imported.
    wait_asleep()

    from calm_core.params import load_params
    from calm_core.runtime import threads
    from calm_core.runtime.precision import products, set_threads
    from calm_core.runtime.process_group import ALONE
    from calm_core.training.loop import update_weights
    from calm_core.training.optimisers import build_optimisers
    from calm_core.training.parallel_model import ParallelModel
    from calm_core.training.passes import Passes, threads_of_batch

    if in_turn:
        threads.MOST_SIDE_BY_SIDE = 1
    params = load_params()
    set_threads(params.runtime.threads)
    section = getattr(params, training)
    with tempfile.TemporaryDirectory() as folder:
        objective = _objective(training, params, Path(folder))
        objective.model.train()
        parallel = ParallelModel(objective.model, ALONE, params.runtime)
        optimisers = build_optimisers(
            objective.model,
            section,
            products(params.runtime.precision, ALONE.device),
            threads_of_batch(objective, ALONE, params.runtime),
        )
        started, done = 0.0, 0
        with Passes(objective, parallel, params.runtime, ALONE, range(10**9)) as passes:
            for step in range(10**9):
                if step == WARM_UP:
                    started = time.perf_counter()
                passes.of_step(step)
                update_weights(objective.model, optimisers, section.gradient_clip)
                done = step + 1 - WARM_UP
                if done > 0 and time.perf_counter() - started > SECONDS:
                    break
        return done * objective.rows * objective.tokens_per_row / (time.perf_counter() - started)


def _objective(training: str, params: Any, folder: Path) -> Any:
    """Of random tokens."""
    import torch

    from calm_core.autoencoder.model import Autoencoder
    from calm_core.autoencoder.training import AutoencoderObjective, autoencoder_config
    from calm_core.calm.token_training import TokenHeadObjective
    from calm_core.calm.training import STAGE, CalmObjective, calm_config
    from calm_core.latents.encode import encode_corpus
    from calm_core.latents.shards import LatentCorpus
    from calm_core.runtime.randomness import generator
    from calm_core.tokens.shards import TokenStream, TokenWriter
    from calm_core.transformer.training import TransformerObjective

    writer = TokenWriter(folder, "train", VOCABULARY)
    for document in torch.randint(VOCABULARY, (TOKENS,), generator=generator(0, "benchmarks")).split(1000):
        writer.write(document.tolist())
    writer.flush()
    tokens = TokenStream(folder, "train")
    if training == "autoencoder":
        return AutoencoderObjective(params.autoencoder, tokens, VOCABULARY, 0)
    if training == "transformer":
        return TransformerObjective(params.transformer, tokens, VOCABULARY, 0)
    coder = autoencoder_config(params.autoencoder, VOCABULARY)
    if params.calm.head == "tokens":
        return TokenHeadObjective(params.calm, calm_config(params.calm, coder), tokens, 0, STAGE)
    autoencoder = Autoencoder(coder)
    autoencoder.initialise(generator(0, "benchmarks"))
    encode_corpus(autoencoder.eval().requires_grad_(False), tokens, folder, "float32")
    return CalmObjective(params.calm, tokens, LatentCorpus(folder), autoencoder, 0)


if __name__ == "__main__":
    print(main(sys.argv[1], sys.argv[2] == "1"))
