"""A device that is not there: CPU tensors that say another device and refuse to be mixed.

torch's FakeTensorMode has no values, and what is skipped depends on values. These tensors compute
on the CPU, report another device, and raise where an operation brings devices together, as a card
would. Scalars of zero dimensions may come from the CPU, as everywhere in torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

DEVICE = torch.device("meta")  # the one device beside the CPU that every build of torch knows


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
            return PretendTensor(function(*args, **kwargs))
        return function(*args, **kwargs)


def _run(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    seen: set[str] = set()

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
    """Within this context tensors can be made on `DEVICE` and moved to it."""
    with torch.no_grad(), _Literals(), _Factories():
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
