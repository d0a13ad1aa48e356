"""Faults that strike a stage's process at a chosen moment, by count and never by time."""

import ctypes
import gc
import itertools
import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import calm_core.latents.encode
import calm_core.latents.shards
import calm_core.storage.provenance
import calm_core.tokens.batch_encoding
import calm_core.tokens.shards
import calm_core.training.loop
import stages.runner.run
from calm_core.nn.backbone import Backbone
from calm_core.tokens.shards import TokenStream
from calm_core.training.checkpoints import CheckpointStore
from calm_core.training.parallel_model import ParallelModel

FILE_EVENTS = {"open", "os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir", "shutil.copyfile"}
"""What Python tells its audit hooks of files: each is a moment at which a process can die."""


SHARD = re.compile(r"-\d{5}\.safetensors$")
"""How the name of a shard ends."""


def save_every_step() -> None:
    """A checkpoint after each step."""
    CheckpointStore.due = lambda self: True  # type: ignore[method-assign]


def small_shards() -> None:
    """Shards so small that the project's corpus fills a dozen."""
    calm_core.tokens.shards.SHARD_TOKENS = 10_000
    calm_core.tokens.batch_encoding.BATCH_DOCUMENTS = 32
    calm_core.latents.encode.SHARD_PATCHES = calm_core.latents.shards.SHARD_PATCHES = 600


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at_step(number: int) -> None:
    """SIGKILL when step ``number`` (1 is the first of this process) has its loss, before the weights move."""
    at_step(number, die)


def signal_at_step(number: int, which: signal.Signals) -> None:
    """Ctrl-C or SIGTERM at the same moment."""
    at_step(number, lambda: os.kill(os.getpid(), which))


def at_step(number: int, act: Callable[[], None]) -> None:
    original, steps = calm_core.training.loop.update_weights, itertools.count(1)

    def update_weights(*arguments: Any) -> torch.Tensor:
        if next(steps) == number:
            act()
        return original(*arguments)

    calm_core.training.loop.update_weights = update_weights


def record_gathered(path: Path) -> None:
    """Write the dtypes of a layer's matrix, of what its norm makes of its input, and of the last norm's gain."""
    original = Backbone.forward

    def forward(self: Backbone, *arguments: Any, **keywords: Any) -> torch.Tensor:
        if self.training:
            layer, found = self.layers[0], list[torch.dtype]()
            hooks = [
                layer.mlp_norm.register_forward_hook(
                    lambda module, inputs, output: found.extend([layer.mlp.down.weight.dtype, output.dtype])
                )
            ]
            hidden_states = original(self, *arguments, **keywords)
            found.append(self.norm.weight.dtype)
            path.write_text(" ".join(map(str, found)), encoding="utf-8")
            for hook in hooks:
                hook.remove()
            return hidden_states
        return original(self, *arguments, **keywords)

    Backbone.forward = forward  # type: ignore[method-assign]


def loss_at_step(number: int, factor: float) -> None:
    """The loss of step ``number`` is multiplied by ``factor``, and its gradient with it."""
    original, steps = ParallelModel.forward, itertools.count(1)

    def forward(self: ParallelModel[Any], work: Callable[[], Any]) -> Any:
        loss = original(self, work)
        return loss._replace(total=loss.total * factor) if next(steps) == number else loss

    ParallelModel.forward = forward  # type: ignore[method-assign]


def kill_in_file_above(size: int) -> None:
    """The kernel kills the process in the middle of a write, as a file is about to grow beyond ``size`` bytes."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    limit_files(size)


def limit_files(size: int) -> None:
    """No file can grow beyond ``size`` bytes: a write fails as it does under a quota."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def limit_memory(extra: int) -> None:
    """No more than ``extra`` bytes of memory beside what the process has already; Linux alone."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    size = pages * resource.getpagesize() + extra
    resource.setrlimit(resource.RLIMIT_AS, (size, size))


def limit_data(extra: int) -> None:
    """No more than ``extra`` bytes of data beside what the process has already: memory that only swapping frees. Linux.

    Files that are mapped for reading do not count, since the system drops their pages whenever it wants them, nor do
    addresses that an allocator reserves without using them; both count towards the limit of ``limit_memory``. What is
    free inside the process is given back first, or it would be room beside ``extra``.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData:")]
    size = int(line.split()[1]) * 1024 + extra
    resource.setrlimit(resource.RLIMIT_DATA, (size, size))


def out_of_memory_at_step(number: int) -> None:
    """A step asks for more than any machine has."""

    def act() -> None:
        # Not by a limit on the process: the threads of other libraries may be the first to meet that, and abort.
        torch.zeros(1 << 50)

    at_step(number, act)


def record_windows(path: Path) -> None:
    """Write to ``path`` where the windows of tokens begin that this process reads, a line each."""
    original = TokenStream.windows

    def windows(self: TokenStream, starts: torch.Tensor, length: int) -> torch.Tensor:
        with path.open("a", encoding="utf-8") as file:
            file.writelines(f"{start}\n" for start in starts.tolist())
        return original(self, starts, length)

    TokenStream.windows = windows  # type: ignore[method-assign]


def record_hashes(path: Path) -> None:
    """Write to ``path`` which files this process hashes to verify them, a line each."""
    path.touch()
    original = calm_core.storage.provenance.sha256

    def sha256(file: Path) -> str:
        with path.open("a", encoding="utf-8") as lines:
            lines.write(f"{file}\n")
        return original(file)

    calm_core.storage.provenance.sha256 = sha256  # type: ignore[attr-defined]


def stuck_at_step(number: int, which: signal.Signals) -> None:
    """A signal comes in the middle of a step that does not end; the time to leave is cut short."""
    stages.runner.run.GRACE_SECONDS = 0.1

    def act() -> None:
        os.kill(os.getpid(), which)
        os.read(os.pipe()[0], 1)

    at_step(number, act)


def fill_disk(folder: Path, free_bytes: int) -> None:
    """Leave ``free_bytes`` on the file system of ``folder``, by a file beside it."""
    disk = os.statvfs(folder)
    (folder.parent / "filler").write_bytes(bytes(disk.f_bavail * disk.f_bsize - free_bytes))


def remount(folder: Path, how: str) -> None:
    """Make the file system at ``folder`` "ro" or "rw"."""
    subprocess.run(["mount", "-o", f"remount,{how}", str(folder)], check=True)


def kill_at_file_event(number: int) -> None:
    """SIGKILL just before the operation on files that ``count_file_events`` would count as ``number`` (from 1)."""
    at_file_event(number, die)


def signal_at_file_event(number: int, which: signal.Signals) -> None:
    """Ctrl-C or SIGTERM at the same moment."""
    at_file_event(number, lambda: os.kill(os.getpid(), which))


def at_file_event(number: int, act: Callable[[], None]) -> None:
    events = itertools.count(1)
    _on_file_event(lambda event, path: act() if next(events) == number else None)


def kill_at_shard(number: int) -> None:
    """SIGKILL just before shard ``number`` (from 1, those of both splits together) is opened for writing."""
    shards = itertools.count(1)

    def act(event: str, path: str) -> None:
        if event == "open" and SHARD.search(path) and next(shards) == number:
            die()

    _on_file_event(act)


def count_file_events(path: Path) -> None:
    """Write to ``path``, a byte each, the operations on the project's files: opening, renaming, removing."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    _on_file_event(lambda event, path: os.write(descriptor, b"."))


def name_written_files(path: Path) -> None:
    """Write to ``path``, a line each, the names of the project's files that are opened for writing."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

    def write(event: str, path: str) -> None:
        if event == "open":
            os.write(descriptor, f"{Path(path).name}\n".encode())

    _on_file_event(write)


def _on_file_event(act: Callable[[str, str], Any]) -> None:
    root = str(Path.cwd())
    written = os.O_WRONLY | os.O_RDWR

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in FILE_EVENTS or not isinstance(arguments[0], str | bytes | os.PathLike):
            return
        path = os.path.join(root, os.fsdecode(arguments[0]))  # noqa: PTH118
        if path.startswith(f"{root}/") and (event != "open" or arguments[2] & written):
            act(event, path)

    sys.addaudithook(hook)
