"""Stage check_params: stop before any work, and before DVC removes any output, if params.yaml is wrong."""

from pathlib import Path

from calm_core.params import Params
from calm_core.presets import require_presets_beside
from calm_core.storage.json_io import write_json
from stages.runner.run import run_stage


def main(params: Params) -> None:
    """Say that ``params``, validated while they were read, are good with the presets of evaluation.beside.

    The content is the same for all that are.
    """
    require_presets_beside(params)
    # DVC compares content: a constant file lets no stage after this one run again because of a param that it does not
    # read.
    write_json(Path("data/params_checked.json"), {"valid": True})


if __name__ == "__main__":
    run_stage("check_params", main)
