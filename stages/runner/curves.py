"""Training curves through DVCLive, for `dvc plots` and `dvc exp show`."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from dvclive import Live


@contextmanager
def training_curves(folder: Path) -> Iterator[Callable[[int, Mapping[str, float]], None]]:
    """A ``log`` for ``calm_core.training.loop.train`` that writes a table a scalar under ``folder``/plots/metrics."""
    # dvc.yaml says what to plot and DVC tracks experiments; DVCLive writes the points and nothing else.
    with Live(str(folder), save_dvc_exp=False, dvcyaml=None, report=None) as live:

        def log(step: int, values: Mapping[str, float]) -> None:
            live.step = step
            for name, value in values.items():
                live.log_metric(name, value)
            live.make_summary()

        yield log
