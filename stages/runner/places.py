"""Where the stages of one seed keep what they make: the run's own, and its repetitions under ``evaluation.seeds``.

`python -m stages.train_calm` trains under the seed of params.yaml, and with `--seed 1` again under another one, in
repeats/1, which is laid out as the project is. The tokens are common to all: no seed goes into them.

With `--preset NAME` it trains the CALM of a preset of ``evaluation.beside``, in beside/NAME or, under a seed as well,
beside/NAME/SEED, on the autoencoder and the latents of that seed. Its section of params is data/beside/NAME.json, which
the stage check_params makes of the preset and params.yaml: where it stays as it is, nothing is trained anew.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

from calm_core.params import Params, parse_params
from calm_core.storage.json_io import read_json

BESIDE = Path("data/beside")
"""Section calm of each preset of ``evaluation.beside``, in NAME.json."""


@dataclass(frozen=True)
class Places:
    """Folders of a run, of its repetition under ``seed``, or of the CALM of ``preset`` beside either."""

    seed: int | None = None
    preset: str | None = None

    @property
    def root(self) -> Path:
        """The folder that what is made here lies in, but for scores and correlations."""
        if self.preset is None:
            return Path() if self.seed is None else Path("repeats") / str(self.seed)
        beside = Path("beside") / self.preset
        return beside if self.seed is None else beside / str(self.seed)

    @property
    def models(self) -> Path:
        return self.root / "models"

    @property
    def autoencoder(self) -> Path:
        """That of the seed, which all of its CALMs have in common."""
        return Places(self.seed).models / "autoencoder"

    @property
    def latents(self) -> Path:
        """By the autoencoder of the seed."""
        return Places(self.seed).root / "data/latents"

    @property
    def results(self) -> Path:
        return self.root / "results"

    def scores(self, model: str) -> Path:
        """Of ``model``, without a suffix; those of all seeds lie in one folder, on which their comparison depends."""
        name = model if self.preset is None else f"{model}-{self.preset}"
        return Path("results/scores") / (name if self.seed is None else f"{name}-seed-{self.seed}")

    @property
    def correlation(self) -> Path:
        """What BrierLM is compared with along the trainings; those of all seeds lie in one folder, too."""
        return Path("results/correlation") / ("run.json" if self.seed is None else f"seed-{self.seed}.json")

    def params(self, params: Params) -> Params:
        """``params`` of what is done here: of the preset, and under the seed of the repetition, which has no others.

        Raises:
            CalmError: the section of the preset is missing in data/beside, or does not fit ``params``.
        """
        if self.preset is not None:
            section = read_json(BESIDE / f"{self.preset}.json")
            params = parse_params({**params.model_dump(), "calm": section}, f"preset {self.preset}")
        if self.seed is None:
            return params
        evaluation = params.evaluation.model_copy(update={"seeds": []})
        return params.model_copy(update={"seed": self.seed, "evaluation": evaluation})

    def stage(self, name: str) -> str:
        """What dvc.yaml calls the stage ``name``."""
        if self.preset is None:
            return name if self.seed is None else f"repeat_{name}@{self.seed}"
        return (
            f"beside_{name}@{self.preset}" if self.seed is None else f"repeat_beside_{name}@{self.preset}-{self.seed}"
        )


RUN = Places()


def asked_places(arguments: list[str], of_calm: bool = False) -> Places:
    """The places that the command line of a stage asks for: by `--seed N`, and `--preset NAME` if it is ``of_calm``."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--seed", type=int, help="repeat the stage under this seed, in repeats/SEED")
    if of_calm:
        told = "do it for the CALM of this preset, in beside/PRESET"
        parser.add_argument("--preset", choices=[path.stem for path in sorted(BESIDE.glob("*.json"))], help=told)
    asked = parser.parse_args(arguments)
    return Places(asked.seed, asked.preset if of_calm else None)
