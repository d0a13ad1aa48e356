"""A pretend device: finds tensors that code makes in the wrong place, and counts transfers, without an accelerator.

While ``pretend_device`` is open there is one device more. Its tensors are wrappers around tensors of the CPU, which
compute, so that results have values and can be compared. What would fail on a GPU fails on it:

- an operator that gets tensors of both devices raises ``MisplacedTensorError``, but for CPU tensors of no dimension;
- so does a generator of one device that draws for the other, and ``numpy()`` of a tensor on it, as torch's own do;
- with ``float64=False`` a float64 tensor on it does, as on Apple's GPUs.

Copies and reads are recorded, each with the line of code that asked for it: ``to_device``, and ``from_device``, which
make the CPU wait for a GPU.

The device is called meta:1, since torch lets no build without CUDA make gradients on "cuda". Autocast does not know it.
Threads that are started meanwhile see it too.
"""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten

DEVICE = torch.device("meta", 1)
CPU = torch.device("cpu")

WAITING = {
    aten.nonzero.default,
    aten.masked_select.default,
    aten.equal.default,
    aten._unique2.default,
    aten._unique.default,
    aten.unique_dim.default,
    aten.unique_consecutive.default,
    aten.repeat_interleave.Tensor,
    aten.bincount.default,
}
"""Operators whose result has a size, or a Python value, that a GPU has to report."""


class MisplacedTensorError(AssertionError):
    """A tensor or a generator is on another device than what it is used with."""


class Transfer(NamedTuple):
    """A copy between the devices, or a read that waits."""

    operator: str
    place: str
    """File and line of the innermost frame outside of torch and this module."""
    values: int
    """How many numbers are copied."""
    non_blocking: bool = False


@dataclass
class PretendDevice:
    """What ``pretend_device`` hands out."""

    device: torch.device = DEVICE
    to_device: list[Transfer] = field(default_factory=list)
    from_device: list[Transfer] = field(default_factory=list)

    @property
    def transfers(self) -> list[Transfer]:
        """All of both kinds."""
        return self.to_device + self.from_device

    def forget(self) -> None:
        """Begin to count anew."""
        self.to_device.clear()
        self.from_device.clear()


@contextmanager
def pretend_device(float64: bool = True) -> Iterator[PretendDevice]:
    """Have a device ``PretendDevice.device`` while the block runs; see the module's docstring."""
    pretend = PretendDevice()
    run = threading.Thread.run

    def run_with_device(thread: threading.Thread) -> None:
        with _Mode(pretend, float64):  # modes belong to a thread
            run(thread)

    with (
        mock.patch.object(torch, "Generator", PretendGenerator),
        mock.patch.object(threading.Thread, "run", run_with_device),
        mock.patch.object(torch, "tensor", partial(_made_of_values, torch.tensor)),
        mock.patch.object(torch, "as_tensor", partial(_made_of_values, torch.as_tensor)),
        # AdamW asks it for the devices that have its fused kernel.
        mock.patch("torch.optim.optimizer._get_fused_kernels_supported_devices", lambda: ["cpu", "meta"]),
        _Mode(pretend, float64),
    ):
        yield pretend


class PretendGenerator(torch.Generator):
    """A generator of either device: ``torch.Generator`` while ``pretend_device`` is open."""

    def __new__(cls, device: torch.device | str = CPU) -> "PretendGenerator":
        # Of the pretend device's tensors the values are on the CPU, so their generator is.
        on_cpu = torch.device(device).type == "meta"
        generator = super().__new__(cls, CPU if on_cpu else device)
        if on_cpu:
            _GENERATORS[generator._cdata] = generator
        return generator

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return DEVICE if self._cdata in _GENERATORS else super().device


_GENERATORS: dict[int, torch.Generator] = {}
"""Generators of the pretend device, by the address under which operators get them."""


class PretendTensor(torch.Tensor):
    """A tensor of the pretend device: ``values`` on the CPU."""

    values: Tensor

    @staticmethod
    def __new__(cls: type["PretendTensor"], values: Tensor) -> "PretendTensor":
        return Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            layout=values.layout,
            device=DEVICE,
        )

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"PretendTensor({self.values!r})"

    def tolist(self) -> Any:
        """As torch's own, which takes no wrapper: a copy to the CPU."""
        return self.cpu().tolist()

    # These two tell torch that it is a wrapper, which ``Module.to`` asks.
    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["values"], None

    @staticmethod
    def __tensor_unflatten__(parts: dict[str, Tensor], context: Any, size: Any, stride: Any) -> "PretendTensor":
        return PretendTensor(parts["values"])

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise MisplacedTensorError(f"{operator}: a tensor of the pretend device outlived it")


class _Mode(TorchDispatchMode):
    """Sees every operator of a thread."""

    def __init__(self, pretend: PretendDevice, float64: bool) -> None:
        super().__init__()
        self._pretend, self._float64 = pretend, float64

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented  # sharded tensors, whose own parts come here again
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        ours = [leaf for leaf in leaves if isinstance(leaf, PretendTensor)]
        others = [leaf for leaf in leaves if isinstance(leaf, Tensor) and not isinstance(leaf, PretendTensor)]
        device = kwargs.get("device")
        wanted = bool(ours) if device is None else torch.device(device) == DEVICE
        if not ours and not wanted:
            self._require_generator(operator, leaves, here=False)
            return operator(*args, **kwargs)
        self._record(operator, args, kwargs, ours, others, wanted)
        self._require_generator(operator, leaves, here=wanted)
        if operator not in _COPIES and ours:
            for other in others:
                if other.dim() or other.device != CPU:
                    raise MisplacedTensorError(f"{operator} gets tensors of two devices, at {_place()}")
        inner = {**kwargs, "device": CPU} if device is not None else kwargs
        result = operator(*tree_map(_values, args), **tree_map(_values, inner))
        if not wanted:
            return result
        wrapped = tree_map(partial(self._wrapped, operator), result)
        return return_and_correct_aliasing(operator, args, kwargs, wrapped) if ours else wrapped

    def _record(
        self, operator: Any, args: Any, kwargs: Any, ours: list[PretendTensor], others: list[Tensor], wanted: bool
    ) -> None:
        moved = partial(Transfer, str(operator), _place())
        if operator is aten._to_copy.default and bool(ours) != wanted:
            log = self._pretend.to_device if wanted else self._pretend.from_device
            log.append(moved(args[0].numel(), bool(kwargs.get("non_blocking"))))
        elif operator is aten.copy_.default and ours and others:
            log = self._pretend.to_device if isinstance(args[0], PretendTensor) else self._pretend.from_device
            log.append(moved(args[1].numel(), bool([*args, *kwargs.values(), False][2])))
        elif operator is aten._local_scalar_dense.default or operator in WAITING or _indexes_by_mask(operator, args):
            self._pretend.from_device.append(moved(1))

    def _require_generator(self, operator: Any, leaves: list[Any], here: bool) -> None:
        for leaf in leaves:
            if isinstance(leaf, torch._C.Generator) and (leaf._cdata in _GENERATORS) != here:
                raise MisplacedTensorError(f"{operator} draws from a generator of the other device, at {_place()}")

    def _wrapped(self, operator: Any, result: Any) -> Any:
        if not isinstance(result, Tensor):
            return result
        if result.dtype == torch.float64 and not self._float64:
            raise MisplacedTensorError(f"{operator} makes a float64 tensor, which the device has not, at {_place()}")
        return PretendTensor(result)


def _made_of_values(make: Callable[..., Tensor], data: Any, *, device: Any = None, **options: Any) -> Tensor:
    """``make``, which no mode sees, so that it puts values on the device by a copy that one does."""
    made = make(data, **options)
    return made if device is None else made.to(device)


_COPIES = {aten._to_copy.default, aten.copy_.default}


def _values(leaf: Any) -> Any:
    return leaf.values if isinstance(leaf, PretendTensor) else leaf


def _indexes_by_mask(operator: Any, args: Any) -> bool:
    """Whether ``operator`` indexes by a bool tensor, whose trues have to be counted."""
    if operator not in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):
        return False
    return any(isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1])


def _place() -> str:
    frame = sys._getframe(1)
    while frame.f_back is not None and ("/torch/" in frame.f_code.co_filename or frame.f_code.co_filename == __file__):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"
