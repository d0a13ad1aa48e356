import multiprocessing
import shutil
from pathlib import Path

import pytest
import yaml

from tests.reliability.support.faults import small_shards
from tests.reliability.support.stage_processes import DATA_STAGES, STAGES, make_project, run_stage_process, run_stages

# There is one server for all tests, started by the first that needs it: what it imports is settled before any of them.
multiprocessing.set_forkserver_preload(["tests.reliability.support.preloaded"])


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small project in which every stage has run, never interrupted; not to be changed."""
    folder = make_project(tmp_path_factory.mktemp("finished") / "project")
    run_stages(folder, *STAGES)
    return folder


@pytest.fixture(scope="session")
def finished_in_shards(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with tokens and latents in a dozen shards; not to be changed."""
    folder = shutil.copytree(finished, tmp_path_factory.mktemp("finished") / "in_shards")
    for stage in DATA_STAGES:
        ended = run_stage_process(folder, stage, small_shards)
        assert ended.status == 0, ended.told
    shutil.rmtree(folder / ".checkpoints")
    return Path(folder)


@pytest.fixture()
def in_shards(finished_in_shards: Path, tmp_path: Path) -> Path:
    """A copy of that, free to break."""
    return Path(shutil.copytree(finished_in_shards, tmp_path / "in_shards"))


@pytest.fixture()
def project(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished project, free to break."""
    return Path(shutil.copytree(finished, tmp_path / "project"))


@pytest.fixture()
def of_latents(project: Path) -> Path:
    """The same with a CALM to train that reads the encoded corpus."""
    params = yaml.safe_load((project / "params.yaml").read_text(encoding="utf-8"))
    params["calm"]["head"] = "energy"
    (project / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
    return project
