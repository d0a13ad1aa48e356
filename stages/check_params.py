"""Stage check_params: stop before any work, and before DVC removes any output, if params.yaml is wrong."""

from pathlib import Path

from calm_core.params import Params
from calm_core.presets import sections_beside
from calm_core.storage.atomic import whole_directory
from calm_core.storage.json_io import write_json
from stages.runner.places import BESIDE
from stages.runner.run import run_stage


def main(params: Params) -> None:
    """Say that ``params``, validated while they were read, are good; the same content for all good params.

    And write down section calm of each preset of evaluation.beside, for which ``params`` have to be good, too.
    """
    sections = sections_beside(params)
    with whole_directory(BESIDE) as folder:
        for name, section in sections.items():
            write_json(folder / f"{name}.json", section.model_dump())
    # DVC compares content: a constant file lets no stage after this one run again because of a param that it does not
    # read.
    write_json(Path("data/params_checked.json"), {"valid": True})


if __name__ == "__main__":
    run_stage("check_params", main)
