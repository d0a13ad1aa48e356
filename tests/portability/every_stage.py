"""`python -m tests.portability.every_stage FOLDER`: the small project's stages, then commands of `calm`.

Each is forked from this process, which imports everything once, and this process ends with the first that fails.
"""

import importlib
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import yaml

from calm_core.cli import main as calm
from stages.runner.run import run_stage
from tests.reliability.support.preloaded import STAGES
from tests.reliability.support.stage_processes import BY_PROCESSES, make_project

COMMANDS = (
    "check",
    "plan --json",
    "generate --model models/calm --prompt word1 --tokens 9 --temperature 0.5",
    "generate --model models/transformer --prompt word1 --tokens 9 --json",
    "evaluate --model models/calm --corpus data/tokens --tokens 400 --output results/evaluations/calm",
    "evaluate --model models/transformer --corpus corpus.txt --tokens 400 --output results/evaluations/transformer",
    "export-checkpoint models/autoencoder exported",
)


def main(folder: Path) -> None:
    """Make the project in ``folder`` and run it all there, threads, precision and device left to the program."""
    make_project(folder)
    os.chdir(folder)
    params = yaml.safe_load(Path("params.yaml").read_text(encoding="utf-8"))
    params["runtime"].update(threads="auto", precision="auto")
    Path("params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
    for stage in STAGES:
        module = importlib.import_module(f"stages.{stage}")
        _in_a_process(stage, lambda name=stage, work=module.main: run_stage(name, work, name in BY_PROCESSES))
    for command in COMMANDS:
        sys.argv = ["calm", *command.split()]
        _in_a_process(f"calm {command}", calm)


def _in_a_process(name: str, work: Callable[[], None]) -> None:
    process = os.fork()
    if process == 0:
        status = 1
        try:
            work()
            status = 0
        except SystemExit as ended:
            print(*([ended.code] if isinstance(ended.code, str) else []), file=sys.stderr)
            status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    if status:
        sys.exit(f"{name}: status {status}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
