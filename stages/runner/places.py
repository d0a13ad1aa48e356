"""Where the stages of one seed keep what they make: the run's own, and its repetitions under ``evaluation.seeds``.

`python -m stages.train_calm` trains under the seed of params.yaml, and with `--seed 1` again under another one, in
repeats/1, which is laid out as the project is. The tokens are common to all: no seed goes into them.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

from calm_core.params import Params


@dataclass(frozen=True)
class Places:
    """Folders of a run, or of its repetition under ``seed``."""

    seed: int | None = None

    @property
    def root(self) -> Path:
        """The folder that the others lie in."""
        return Path() if self.seed is None else Path("repeats") / str(self.seed)

    @property
    def models(self) -> Path:
        return self.root / "models"

    @property
    def latents(self) -> Path:
        return self.root / "data/latents"

    @property
    def results(self) -> Path:
        return self.root / "results"

    def scores(self, model: str) -> Path:
        """Of ``model``, without a suffix; those of all seeds lie in one folder, on which their comparison depends."""
        return Path("results/scores") / (model if self.seed is None else f"{model}-seed-{self.seed}")

    @property
    def correlation(self) -> Path:
        """What BrierLM is compared with along the trainings; those of all seeds lie in one folder, too."""
        return Path("results/correlation") / ("run.json" if self.seed is None else f"seed-{self.seed}.json")

    def params(self, params: Params) -> Params:
        """``params`` of what is done here: under the seed of the repetition, which has no repetitions itself."""
        if self.seed is None:
            return params
        evaluation = params.evaluation.model_copy(update={"seeds": []})
        return params.model_copy(update={"seed": self.seed, "evaluation": evaluation})

    def stage(self, name: str) -> str:
        """What dvc.yaml calls the stage ``name``."""
        return name if self.seed is None else f"repeat_{name}@{self.seed}"


RUN = Places()


def asked_places(arguments: list[str]) -> Places:
    """The places that the command line of a stage asks for: those of `--seed N`, or the run's own."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--seed", type=int, help="repeat the stage under this seed, in repeats/SEED")
    return Places(parser.parse_args(arguments).seed)
