import shutil
from pathlib import Path

import pytest

from tests.reliability.stage_processes import STAGES, make_project, run_stages


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small project in which every stage has run, never interrupted; not to be changed."""
    folder = make_project(tmp_path_factory.mktemp("finished") / "project")
    run_stages(folder, *STAGES)
    return folder


@pytest.fixture()
def project(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished project, free to break."""
    return Path(shutil.copytree(finished, tmp_path / "project"))
