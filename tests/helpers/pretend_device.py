"""A device that is not there: CPU tensors that say another device and refuse to be mixed.

torch's FakeTensorMode has no values, and what is skipped depends on values. These tensors compute
on the CPU, report another device, and raise where an operation brings devices together, as a card
would. Scalars of zero dimensions may come from the CPU, as everywhere in torch.

What makes the host of a CUDA device wait is counted (`host_questions`): a number or a list of a
tensor, a mask as an index, a copy to the CPU, and a copy from it that blocks. The list is that of
torch's `torch.cuda.set_sync_debug_mode`, by hand.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

DEVICE = torch.device("meta")  # the one device beside the CPU that every build of torch knows
aten = torch.ops.aten
ASKING = (
    *(aten._local_scalar_dense, aten.item, aten.is_nonzero, aten.equal, aten.nonzero),
    *(aten.masked_select, aten.bincount, aten._unique2, aten.unique_consecutive, aten.unique_dim),
)
READING = ("to_host", "to_cpu")  # of gateskip/model/families.py
INDEXING = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_)


@dataclass
class Questions:
    """Where the host waited for the device: names of operations."""

    in_steps: list[str] = field(default_factory=list)
    reads: list[str] = field(default_factory=list)  # by `to_host` or `to_cpu`, between steps


_counters: list[Questions] = []


@contextmanager
def host_questions() -> Iterator[Questions]:
    """Within this context the questions to the pretended device are collected."""
    asked = Questions()
    _counters.append(asked)
    try:
        yield asked
    finally:
        _counters.remove(asked)


def _ask(name: str) -> None:
    frame, reads = sys._getframe(1), False
    while frame is not None and not reads:
        reads, frame = frame.f_code.co_name in READING, frame.f_back  # type: ignore[assignment]
    for asked in _counters:
        (asked.reads if reads else asked.in_steps).append(name)


def _asks(function: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether the host of a CUDA device would wait in this operation."""
    packet, first = function.overloadpacket, args[0] if args else None
    on_device = isinstance(first, PretendTensor)
    if packet in ASKING:
        return on_device
    if packet in INDEXING:
        indices = [each for each in args[1] if isinstance(each, Tensor)]
        return on_device and any(each.dtype in (torch.bool, torch.uint8) for each in indices)
    if packet is aten.repeat_interleave:
        return function is aten.repeat_interleave.Tensor and kwargs.get("output_size") is None
    if packet is aten._to_copy:
        goal = kwargs.get("device")
        moves = goal is not None and (torch.device(goal).type == DEVICE.type) != on_device
        return moves and (on_device or not kwargs.get("non_blocking", False))
    if packet is aten.copy_:
        moves = on_device != isinstance(args[1], PretendTensor)
        return moves and not (on_device and (args[1].dim() == 0 or _flag(args, kwargs)))
    return False


def _flag(args: Any, kwargs: dict[str, Any]) -> bool:
    return bool(kwargs.get("non_blocking", args[2] if len(args) > 2 else False))


class PretendTensor(Tensor):
    """A CPU tensor that says it is on `DEVICE`."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> PretendTensor:
        made: PretendTensor = Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
            requires_grad=False,
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _run(function, args, kwargs or {})

    def tolist(self) -> Any:
        """The values, which torch does not give of a subclass."""
        _ask("tolist")
        return self.inner.tolist()

    def __repr__(self) -> str:
        return f"PretendTensor({self.inner})"


class _Factories(TorchDispatchMode):
    """Makes tensors that are asked for on `DEVICE` by functions that are given none."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        return _run(function, args, kwargs or {})


class _Literals(TorchFunctionMode):
    """`torch.tensor(values, device=DEVICE)`, whose values the dispatcher never sees."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        kwargs = dict(kwargs or {})
        if function is torch.tensor and kwargs.get("device") == DEVICE:
            kwargs.pop("device")
            _ask("torch.tensor")
            return PretendTensor(function(*args, **kwargs))
        return function(*args, **kwargs)


def _run(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    seen: set[str] = set()
    if _counters and _asks(function, args, kwargs):
        _ask(str(function))

    def unwrap(value: Any) -> Any:
        if isinstance(value, PretendTensor):
            seen.add("pretend")
            return value.inner
        if isinstance(value, Tensor) and value.dim() > 0:
            seen.add("cpu")
        return value

    wanted = kwargs.get("device")
    moves = function.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_)
    plain_args, plain = tree_map(unwrap, args), tree_map(unwrap, kwargs)
    if seen == {"pretend", "cpu"} and not moves:
        raise RuntimeError(f"{function}: tensors on two devices, {DEVICE} and cpu")
    on_device = "pretend" in seen
    if wanted is not None:
        on_device = torch.device(wanted).type == DEVICE.type
        plain["device"] = torch.device("cpu")
    result = function(*plain_args, **plain)
    if not on_device:
        return result
    if isinstance(args[0] if args else None, PretendTensor) and result is plain_args[0]:
        return args[0]  # in place
    return tree_map(lambda x: PretendTensor(x) if isinstance(x, Tensor) else x, result)


@contextmanager
def pretend_device() -> Iterator[None]:
    """Within this context tensors can be made on `DEVICE` and moved to it. No gradients are
    computed; `torch.inference_mode` and `torch.autocast`, which know no such tensors, change
    nothing."""
    mode = torch.inference_mode
    with (
        patch.object(torch, "autocast", lambda device, *args, **settings: nullcontext()),
        patch.object(mode, "__enter__", lambda self: None),
        patch.object(mode, "__exit__", lambda self, *error: None),
        torch.no_grad(),
        _Literals(),
        _Factories(),
    ):
        yield


def onto_device(module: Any) -> Any:
    """The module with its parameters and buffers on `DEVICE`, in place."""
    for part in module.modules():
        for name, parameter in list(part._parameters.items()):
            if parameter is not None:
                part._parameters[name] = PretendTensor(parameter.detach())
        for name, buffer in list(part._buffers.items()):
            if buffer is not None:
                part._buffers[name] = PretendTensor(buffer)
    return module
