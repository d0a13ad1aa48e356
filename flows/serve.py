"""The deployments of prefect.yaml, to be served from a process of ours.

prefect.yaml is the one list of deployments, so that `make ui` and a work pool (`prefect deploy --all`) offer the same.
"""

from pathlib import Path
from typing import Any

from prefect.deployments.runner import RunnerDeployment
from prefect.schedules import Cron

from calm_core.storage.yaml_io import read_yaml
from flows.reproduce import ROOT, reproduce
from flows.study import study
from flows.sweep import sweep
from flows.tune import tune

FLOWS: dict[str, Any] = {
    "flows/reproduce.py:reproduce": reproduce,
    "flows/study.py:study": study,
    "flows/sweep.py:sweep": sweep,
    "flows/tune.py:tune": tune,
}


def deployments(path: Path = ROOT / "prefect.yaml") -> list[RunnerDeployment]:
    """The deployments that ``path`` describes, ready to be served."""
    described = read_yaml(path)["deployments"]
    return [
        FLOWS[entry["entrypoint"]].to_deployment(
            name=entry["name"],
            description=entry["description"],
            tags=entry.get("tags", []),
            parameters=entry.get("parameters", {}),
            schedules=[
                Cron(schedule["cron"], timezone=schedule["timezone"], active=schedule.get("active", True))
                for schedule in entry.get("schedules", [])
            ],
        )
        for entry in described
    ]
