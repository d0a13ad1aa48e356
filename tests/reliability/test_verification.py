"""The comparison behind `make verify` names the first thing that differs."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.reliability.support.stage_processes import run_stage_process
from verification.__main__ import compare
from verification.comparison import differences


@pytest.fixture()
def folders(tmp_path: Path) -> tuple[Path, Path]:
    for name in ("a", "b"):
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "same.txt").write_text("same")
    return tmp_path / "a", tmp_path / "b"


def test_the_same_folders_do_not_differ(folders: tuple[Path, Path]) -> None:
    assert list(differences(*folders)) == []


def test_the_first_differing_tensor_is_named(folders: tuple[Path, Path]) -> None:
    weights = {"a.weight": torch.zeros(2, 3), "b.weight": torch.ones(2, 3), "c.weight": torch.ones(4)}
    save_file(weights, folders[0] / "sub/model.safetensors")
    changed = weights["b.weight"].clone()
    changed[0, 2], changed[1, 1] = 1.25, 0.5
    save_file({**weights, "b.weight": changed, "c.weight": torch.zeros(4)}, folders[1] / "sub/model.safetensors")
    (line,) = differences(*folders)
    told = "tensor b.weight differs in 2 of 6 values, first 1 and 1.25, most by 0.5"
    assert line == f"sub/model.safetensors: {told}"


@pytest.mark.parametrize(
    ("first", "second", "told"),
    [
        ({"w": torch.tensor([0.0])}, {"w": torch.tensor([-0.0])}, "tensor w differs in 1 of 1 values, first 0 and -0"),
        ({"w": torch.ones(2)}, {"w": torch.ones(3)}, "tensor w is torch.float32 [2] and torch.float32 [3]"),
        ({"w": torch.ones(2)}, {"w": torch.ones(2).half()}, "tensor w is torch.float32 [2] and torch.float16 [2]"),
        ({"w": torch.ones(2), "v": torch.ones(1)}, {"w": torch.ones(2)}, "tensor v is in the first alone"),
        ({"w": torch.ones(2)}, {"w": torch.ones(2), "v": torch.ones(1)}, "tensor v is in the second alone"),
        ({"w": torch.tensor([7])}, {"w": torch.tensor([9])}, "first 7 and 9, most by 2"),
    ],
)
def test_tensors(
    folders: tuple[Path, Path], first: dict[str, torch.Tensor], second: dict[str, torch.Tensor], told: str
) -> None:
    for folder, tensors in zip(folders, (first, second), strict=True):
        save_file(tensors, folder / "x.safetensors")
    (line,) = differences(*folders)
    assert told in line


@pytest.mark.parametrize(
    ("name", "first", "second", "told"),
    [
        ("x.json", '{"a": [1, {"b": 2}]}', '{"a": [1, {"b": 3}]}', "a[1].b is 2 and 3"),
        ("x.json", '{"a": 1}', '{"a":1}', "the same values, other layout"),
        ("x.tsv", "step\tloss\n1\t2.5\n", "step\tloss\n1\t2.6\n", "line 2 has '1\\t2.5' and '1\\t2.6'"),
        ("x.txt", "a\n", "a\nb\n", "1 and 2 lines"),
        ("x.bin", "\udc80", "\udc81", "other bytes"),
    ],
)
def test_texts(folders: tuple[Path, Path], name: str, first: str, second: str, told: str) -> None:
    for folder, text in zip(folders, (first, second), strict=True):
        (folder / name).write_text(text, encoding="utf-8", errors="surrogateescape")
    assert list(differences(*folders)) == [f"{name}: {told}"]


def test_files_of_one_side_are_named(folders: tuple[Path, Path]) -> None:
    (folders[1] / "more.txt").write_text("more")
    assert list(differences(*folders)) == [f"more.txt: only in {folders[1] / 'more.txt'}"]


def test_two_runs_of_other_seeds_differ_from_the_first_training_on(finished: Path, project: Path) -> None:
    for folder, lock in ((finished, "seed: 0\n"), (project, "seed: 1\n")):
        (folder / "dvc.lock").write_text(lock)
    params = project / "params.yaml"
    params.write_text(params.read_text().replace("seed: 0", "seed: 1"))
    assert run_stage_process(project, "train_autoencoder").status == 0
    found = compare(finished, project)
    assert {line.split(":")[0] for line in found} == {
        "models/autoencoder/model.safetensors",
        "results/autoencoder.json",
        *(
            f"results/training/autoencoder/{name}"
            for name in ("metrics.json", *(f"plots/metrics/{key}.tsv" for key in ("loss", "cross_entropy", "kl")))
        ),
    }
    assert any("model.safetensors: tensor " in line for line in found)
    shutil.copy(finished / "dvc.lock", project / "dvc.lock")
    assert compare(finished, project) == []
    (finished / "dvc.lock").unlink()
