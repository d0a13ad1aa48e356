"""The stages of a small project on a device that is not the CPU, one after the other, in this process."""

import contextlib
import importlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import yaml
from torch import nn

from calm_core.params import load_params
from calm_core.runtime.device import device_of
from calm_core.training.run import Run
from stages import check_params, digest_corpus, match_compute, report, tokenise
from tests.reliability.support.stage_processes import make_project
from tests.sampling import sampled
from tests.support.pretend_device import PretendDevice, pretend_device

STAGES: dict[str, tuple[str, ...]] = {
    "train_autoencoder": ("train_autoencoder", "reconstruction"),
    "encode_corpus": ("encode_corpus",),
    "train_calm": ("train_calm",),
    "train_transformer": ("train_transformer",),
    "evaluate_calm": ("evaluate_calm", "calm_surprise", "token_head_surprise"),
    "evaluate_transformer": ("evaluate_transformer", "cross_entropy", "transformer_surprise"),
    "evaluate_brierlm": (),
    "correlate_brierlm": (
        "evaluate_calm",
        "calm_surprise",
        "token_head_surprise",
        "evaluate_transformer",
        "cross_entropy",
    ),
    "measure_diversity": ("sampled_continuations",),
}
"""The stages in their order, and the functions of calm_core that do their work; a likelihood is one head's alone."""

OTHERS = {"tokens": "calm_surprise", "energy": "token_head_surprise"}
"""By head, the likelihood that it does not have."""

CHOICES = (
    "calm_core.runtime.process_group",
    "stages.evaluate_calm",
    "stages.evaluate_transformer",
    "stages.correlate_brierlm",
    "stages.measure_diversity",
    "stages.report",
)
"""Modules that ask for the device of params.yaml."""


@contextlib.contextmanager
def chosen(pretend: PretendDevice) -> Iterator[dict[str, set[torch.device]]]:
    """``runtime.device`` is the pretend device, by whatever name params.yaml has.

    Yields where each function of ``STAGES`` found the models and processes that it was given.
    """
    devices: dict[str, set[torch.device]] = {}

    def watched(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def watch(*arguments: Any, **named: Any) -> Any:
            found = devices.setdefault(name, set())
            found |= {device_of(one) for one in arguments if isinstance(one, nn.Module)}
            found |= {one.processes.device for one in arguments if isinstance(one, Run)}
            return work(*arguments, **named)

        return watch

    with contextlib.ExitStack() as stack:
        for module in CHOICES:
            stack.enter_context(mock.patch(f"{module}.choose_device", lambda name: pretend.device))
        for stage, names in STAGES.items():
            module = importlib.import_module(f"stages.{stage}")
            for name in names:
                watch = watched(f"{stage}.{name}", getattr(module, name))
                stack.enter_context(mock.patch.object(module, name, watch))
        load = watched("report.load_language_model", report.load_language_model)

        def loaded(*arguments: Any) -> Any:
            model = load(*arguments)
            devices["report.load_language_model"] |= {model.device}
            return model

        stack.enter_context(mock.patch.object(report, "load_language_model", loaded))
        yield devices


def results(folder: Path) -> dict[str, Any]:
    """What the stages write, and the sample texts of the report."""
    params = load_params(folder / "params.yaml")
    # Nothing goes on from what another device has done.
    shutil.rmtree(".checkpoints", ignore_errors=True)
    for stage in STAGES:
        importlib.import_module(f"stages.{stage}").main(params)
    found = {path.stem: json.loads(path.read_text()) for path in sorted(Path("results").glob("*.json"))}
    found["correlation"] = json.loads(Path("results/correlation/run.json").read_text())
    return {**found, "samples": report._samples(params)}


@pytest.fixture(params=sampled(["tokens", "energy"], "tokens"))
def head(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture()
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, head: str) -> Path:
    """A project in the current folder, whose corpus is tokenised."""
    folder = make_project(tmp_path / "project")
    values = yaml.safe_load((folder / "params.yaml").read_text())
    for section in ("autoencoder", "calm", "transformer"):
        values[section].update(steps=3, warmup_steps=1)
    for section in ("calm", "transformer"):
        values[section].update(checkpoints=3)
    values["calm"].update(head=head)
    values["evaluation"].update(tokens=200, checkpoint_tokens=100, likelihood_tokens=100, bootstrap_resamples=100)
    (folder / "corpus.txt").write_text((folder / "corpus.txt").read_text()[:20_000])
    (folder / "params.yaml").write_text(yaml.safe_dump(values))
    monkeypatch.chdir(folder)
    for stage in (check_params, digest_corpus, tokenise, match_compute):
        stage.main(load_params())
    return folder


def test_all_stages_compute_there_what_they_compute_on_the_cpu(project: Path, head: str) -> None:
    on_cpu = results(project)
    with pretend_device() as pretend, chosen(pretend) as devices:
        found = results(project)
        here = {pretend.device}
    # It moves the autoencoder, if it needs it.
    assert devices.pop("train_calm.train_calm") >= here
    assert devices == dict.fromkeys(devices, here)
    expected = {f"{stage}.{name}" for stage, names in STAGES.items() for name in names if name != OTHERS[head]}
    assert devices.keys() == expected - {"train_calm.train_calm"} | {"report.load_language_model"}
    assert found.keys() == on_cpu.keys() == {"autoencoder", "brierlm", "correlation", "diversity", "samples"}
    # The same draws and, but for the kernel of attention, the same operators.
    assert found["autoencoder"] == pytest.approx(on_cpu["autoencoder"], rel=1e-3)
    for model in ("calm", "transformer"):
        assert found["brierlm"][model]["positions"] == on_cpu["brierlm"][model]["positions"]
        assert found["brierlm"][model]["brier"] == pytest.approx(on_cpu["brierlm"][model]["brier"], abs=0.02)
    entropy = "cross_entropy_nats"
    assert found["brierlm"]["transformer"][entropy] == pytest.approx(on_cpu["brierlm"]["transformer"][entropy], 1e-4)
    for model, measure in (("calm", "nats_per_token"), ("transformer", entropy)):
        nats = found["brierlm"][model]["nats_per_token"]
        assert nats == pytest.approx(on_cpu["brierlm"][model]["nats_per_token"], rel=1e-3)
        rows, on_cpus = (one["correlation"][model]["checkpoints"] for one in (found, on_cpu))
        for row, wanted in zip(rows, on_cpus, strict=True):
            assert row[measure] == pytest.approx(wanted[measure], rel=1e-3)
    assert found["diversity"]["truth"] == on_cpu["diversity"]["truth"]


@pytest.mark.gpu
def test_all_stages_on_cuda(project: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    on_cpu = results(project)
    path = project / "params.yaml"
    path.write_text(path.read_text().replace("device: cpu", "device: cuda"))
    found = results(project)
    assert found["autoencoder"] == pytest.approx(on_cpu["autoencoder"], rel=0.05, abs=0.02)
    entropy = "cross_entropy_nats"
    assert found["brierlm"]["transformer"][entropy] == pytest.approx(on_cpu["brierlm"]["transformer"][entropy], 0.02)
    assert {len(sample) for sample in found["samples"]} == {4}
