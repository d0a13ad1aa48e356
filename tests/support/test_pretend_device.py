"""The pretend device itself: computes as the CPU does, refuses what a GPU refuses, and counts."""

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.support.pretend_device import MisplacedTensorError, PretendDevice, pretend_device


def trained(model: nn.Module, inputs: Tensor) -> list[Tensor]:
    optimiser = torch.optim.AdamW(model.parameters(), fused=True)
    for _ in range(3):
        model(inputs).square().mean().backward()
        optimiser.step()
        optimiser.zero_grad()
    return [parameter.detach() for parameter in model.parameters()]


def test_computes_what_the_cpu_computes() -> None:
    torch.manual_seed(0)
    inputs, model = torch.randn(5, 4), nn.Sequential(nn.Linear(4, 3), nn.SiLU(), nn.LayerNorm(3))
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    expected = [parameter.clone() for parameter in trained(model, inputs)]
    model.load_state_dict(weights)
    with pretend_device() as pretend:
        found = trained(model.to(pretend.device), inputs.to(pretend.device))
        assert {tensor.device for tensor in found} == {pretend.device}
        assert all(torch.equal(*pair) for pair in zip((tensor.cpu() for tensor in found), expected, strict=True))
        assert {parameter.device.type for parameter in model.cpu().parameters()} == {"cpu"}


def test_views_and_writes_in_place_share_memory() -> None:
    with pretend_device() as pretend:
        values = torch.zeros(4, device=pretend.device)
        values[1:3] += 1
        values.view(2, 2)[1, 1] = 5.0
        assert values.tolist() == [0, 1, 1, 5]


MISTAKES: dict[str, Callable[[Tensor, torch.Generator], object]] = {
    "sum": lambda here, generator: here + torch.ones(3),
    "the other way round": lambda here, generator: torch.ones(3) + here,
    "number of the device and tensor of the CPU": lambda here, generator: torch.ones(3) * here[0],
    "index": lambda here, generator: here[torch.tensor([0, 1])],
    "indexed tensor": lambda here, generator: torch.ones(3)[here.long()],
    "mask": lambda here, generator: here.masked_fill(torch.ones(3, dtype=torch.bool), 0),
    "list": lambda here, generator: torch.cat([here, torch.ones(3)]),
    "layer": lambda here, generator: nn.Linear(3, 2)(here),
    "generator of the CPU": lambda here, generator: torch.rand(3, device=here.device, generator=torch.Generator()),
    "generator of the device": lambda here, generator: torch.rand(3, generator=generator),
    "choice": lambda here, generator: torch.multinomial(here + 1, 1, generator=torch.Generator()),
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES.keys())
def test_a_misplaced_tensor_fails(mistake: Callable[[Tensor, torch.Generator], object]) -> None:
    with pretend_device() as pretend:
        here, generator = torch.zeros(3, device=pretend.device), torch.Generator(pretend.device)
        with pytest.raises(MisplacedTensorError, match="test_pretend_device.py"):
            mistake(here, generator)


def test_a_tensor_of_the_device_is_no_numpy_array() -> None:
    with pretend_device() as pretend, pytest.raises((RuntimeError, TypeError)):
        torch.zeros(3, device=pretend.device).numpy()


def test_numbers_of_the_cpu_go_with_the_device() -> None:
    with pretend_device() as pretend:
        assert (torch.ones(2, device=pretend.device) * torch.tensor(3.0)).tolist() == [3, 3]


def test_a_generator_draws_what_one_of_the_cpu_draws() -> None:
    expected = torch.rand(5, generator=torch.Generator().manual_seed(3))
    with pretend_device() as pretend:
        generator = torch.Generator(pretend.device).manual_seed(3)
        assert generator.device == pretend.device
        drawn = torch.rand(5, generator=generator, device=generator.device)
        assert torch.equal(drawn.cpu(), expected)
        assert torch.Generator().device.type == "cpu"


COUNTED: dict[str, tuple[Callable[[Tensor], object], int, int]] = {
    "nothing": (lambda here: (here * 2 + 1).softmax(dim=0).sum(), 0, 0),
    "copy to the device": (lambda here: torch.ones(3).to(here.device), 1, 0),
    "tensor of values": (lambda here: torch.tensor([1, 2], device=here.device), 1, 0),
    "write": (lambda here: here.copy_(torch.ones(3)), 1, 0),
    "write of a part": (lambda here: here[1:].__setitem__(0, torch.ones(1)[0]), 1, 0),
    "copy to the CPU": (lambda here: here.cpu(), 0, 1),
    "item": (lambda here: here[0].item(), 0, 1),
    "float": (lambda here: float(here[0]), 0, 1),
    "list": (lambda here: here.tolist(), 0, 1),
    "condition": (lambda here: bool(here.any()), 0, 1),
    "selection": (lambda here: here[here > 0], 0, 1),
    "distinct values": (lambda here: torch.unique(here), 0, 1),
    "comparison": (lambda here: torch.equal(here, here), 0, 1),
}


@pytest.mark.parametrize(("work", "to_device", "from_device"), COUNTED.values(), ids=COUNTED.keys())
def test_counts_transfers(work: Callable[[Tensor], object], to_device: int, from_device: int) -> None:
    with pretend_device() as pretend:
        here = torch.zeros(3, device=pretend.device)
        pretend.forget()
        work(here)
        assert (len(pretend.to_device), len(pretend.from_device)) == (to_device, from_device)
        assert all("test_pretend_device.py:" in transfer.place for transfer in pretend.transfers)


def test_tells_which_copies_wait() -> None:
    with pretend_device() as pretend:
        torch.ones(2).to(pretend.device)
        torch.ones(2).to(pretend.device, non_blocking=True)
        torch.zeros(2, device=pretend.device).copy_(torch.ones(2), non_blocking=True)
        assert [transfer.non_blocking for transfer in pretend.to_device] == [False, True, True]


def test_refuses_float64_if_asked() -> None:
    with pretend_device(float64=False) as pretend:
        here = torch.zeros(3, device=pretend.device)
        for make in (here.double, lambda: here.cumsum(dim=0, dtype=torch.float64)):
            with pytest.raises(MisplacedTensorError, match="float64"):
                make()
        assert here.cpu().double().dtype == torch.float64


def test_other_threads_see_it() -> None:
    def copy(pretend: PretendDevice, found: list[Tensor]) -> None:
        found.append(torch.ones(2).to(pretend.device))

    with pretend_device() as pretend:
        found: list[Tensor] = []
        thread = threading.Thread(target=copy, args=(pretend, found))
        thread.start()
        thread.join()
        assert (found[0] + torch.ones(2, device=pretend.device)).tolist() == [2, 2]
        assert len(pretend.to_device) == 1


def test_nothing_of_it_is_left() -> None:
    run, generator = threading.Thread.run, torch.Generator
    with pretend_device() as pretend:
        here = torch.ones(2, device=pretend.device)
    assert (threading.Thread.run, torch.Generator) == (run, generator)
    with pytest.raises(MisplacedTensorError, match="outlived"):
        here + 1
