"""Stage match_compute: params -> data/transformer_steps.json, for how many steps the Transformer is trained.

A stage of its own, so that the Transformer is trained anew where CALM's compute changes, and not where another of
CALM's params does: DVC compares the number. An integer in transformer.steps is passed on.
"""

from pathlib import Path

from calm_core.costs.matching import with_matched_steps
from calm_core.params import Params
from calm_core.storage.json_io import write_json
from stages.runner.run import run_stage


def main(params: Params) -> None:
    """Match, write."""
    # The number and nothing else: whatever else stood here would train the Transformer anew when it changed.
    write_json(Path("data/transformer_steps.json"), {"steps": with_matched_steps(params).transformer.known_steps})


if __name__ == "__main__":
    run_stage("match_compute", main)
