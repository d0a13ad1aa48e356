"""Stages as real processes that can be killed, in a project of a few seconds.

A process is forked from one that has imported everything (multiprocessing's forkserver) and runs a stage just as
`python -m stages.NAME` does. A fault is a function that it calls first.
"""

import contextlib
import faulthandler
import importlib
import multiprocessing
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import yaml

from calm_core.params import load_params
from calm_core.presets import load_preset
from tests import ROOT
from tests.reliability.support.preloaded import STAGES

Fault = Callable[[], None]

OUTPUTS = {
    name: [
        next(iter(out)) if isinstance(out, dict) else out for kind in ("outs", "metrics") for out in found.get(kind, [])
    ]
    for name, found in yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"].items()
}
BY_PROCESSES = ("train_autoencoder", "encode_corpus", "train_calm", "train_transformer")
PERSISTENT = ("check_params", "digest_corpus", "tokenise", "encode_corpus")
"""Stages whose outputs DVC leaves where they are before it runs them."""


DATA_STAGES = ("tokenise", "encode_corpus")


class Ended(NamedTuple):
    """How a process ended: its status, or minus the signal that killed it; and what it wrote to standard error."""

    status: int
    told: str


def make_project(folder: Path) -> Path:
    """A project in which each stage takes a second or less, without outputs."""
    for name in ("calm_core", "stages", "presets"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "dvc.yaml", folder)
    words = random.Random(0).choices([f"word{number}" for number in range(300)], k=20_000)
    documents = [" ".join(words[start : start + 20]) for start in range(0, len(words), 20)]
    (folder / "corpus.txt").write_text("\n".join(documents), encoding="utf-8")
    with contextlib.chdir(ROOT):
        params = load_preset("smoke").model_dump()
    params["runtime"].update(threads=1, precision="float32")
    params["corpus"].update(source="files", paths=["corpus.txt"], text_unit="line", documents=None)
    params["tokenizer"].update(vocabulary_size=300)
    params["autoencoder"].update(batch_patches=16)
    for section in ("calm", "transformer"):
        params[section].update(hidden_size=16, intermediate_size=24, context_tokens=32)
    params["transformer"].update(steps=12)
    params["evaluation"].update(tokens=500, checkpoint_tokens=300)
    (folder / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
    load_params(folder / "params.yaml")
    return folder


WHERE = signal.SIGUSR1
"""Has a process write to standard error where each of its threads is."""

MOST_SECONDS = 120.0
"""How long a stage of the small project may take, many times what it does."""


def run_stage_process(folder: Path, stage: str, *faults: Fault) -> Ended:
    """Run ``stage`` in ``folder`` in a process of its own that calls ``faults`` first, and wait for its end.

    Outputs are removed before as DVC does.
    """
    (ended,) = run_stage_processes(folder, stage, [faults])
    return ended


def run_stage_processes(folder: Path, stage: str, faults: Sequence[Sequence[Fault]]) -> list[Ended]:
    """The same in as many processes as there are lists of ``faults``, each told by its environment which it is.

    They are started as torchrun's agent would start them, but nobody ends the others when one ends.
    """
    if stage not in PERSISTENT:
        remove_outputs(folder, stage)
    context = multiprocessing.get_context("forkserver")
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(len(faults))}
    with contextlib.ExitStack() as stack:
        running = []
        for rank, own in enumerate(faults):
            told = Path(stack.enter_context(tempfile.NamedTemporaryFile()).name)
            environment = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} if len(faults) > 1 else {}
            process = context.Process(target=_work, args=(folder, stage, told, tuple(own), environment))
            process.start()
            running.append((process, told))
        for process, _ in running:
            process.join(MOST_SECONDS)
            if process.is_alive():  # waits for one that is gone: a failure of the test, not an endless run
                os.kill(process.pid or 0, WHERE)
                process.join(1)
                process.kill()
                process.join()
        return [Ended(int(process.exitcode or 0), told.read_text(encoding="utf-8")) for process, told in running]


def free_port() -> int:
    """A port below those that the kernel gives out by itself.

    One of those could go to another test's process before this one listens, and bytes that are not its own make gloo
    crash.
    """
    for port in random.SystemRandom().sample(range(20_000, 30_000), 100):
        with contextlib.suppress(OSError), socket.socket() as listener:
            listener.bind(("127.0.0.1", port))
            return port
    raise RuntimeError("no port from 20,000 to 30,000 is free")


def run_stages(folder: Path, *stages: str) -> None:
    for stage in stages:
        ended = run_stage_process(folder, stage)
        assert ended.status == 0, ended.told


def remove_outputs(folder: Path, stage: str) -> None:
    for output in OUTPUTS[stage]:
        path = folder / output
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def fingerprint(folder: Path, stage: str) -> dict[str, str]:
    """The content of all outputs of ``stage``."""
    paths = [folder / output for output in OUTPUTS[stage]]
    files = [file for path in paths for file in ([path] if path.is_file() else sorted(path.rglob("*")))]
    return {str(file.relative_to(folder)): sha256(file.read_bytes()).hexdigest() for file in files if file.is_file()}


def _work(folder: Path, stage: str, told: Path, faults: tuple[Fault, ...], environment: dict[str, str]) -> None:
    os.chdir(folder)
    os.environ.update(environment)
    descriptor = os.open(told, os.O_WRONLY | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", encoding="utf-8", closefd=False, buffering=1) for number in (1, 2))
    faulthandler.register(WHERE, sys.stderr)
    for fault in faults:
        fault()
    by_processes = stage in BY_PROCESSES
    importlib.import_module("stages.runner.run").run_stage(
        stage, importlib.import_module(f"stages.{stage}").main, by_processes
    )


__all__ = [
    "DATA_STAGES",
    "STAGES",
    "Ended",
    "fingerprint",
    "make_project",
    "remove_outputs",
    "run_stage_process",
    "run_stage_processes",
    "run_stages",
]
