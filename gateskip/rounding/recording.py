"""A layer's passes over the same text, in which no linear layer runs twice on a batch.

Rounding a layer takes a pass for each group of linear modules, and every pass goes a little further
than the one before. A module that returned in a pass holds only linear layers that are rounded
already, so that its output is final, and later passes take it from here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn

Call = tuple[nn.Module, int]
"""A module, and how many calls of it came before in the same pass."""


class Recording:
    """Outputs of a layer's linear modules, and of modules that hold some, batch by batch."""

    def __init__(self, layer: nn.Module) -> None:
        self._modules = [part for part in layer.modules() if part is not layer and _is_linear(part)]
        self._outputs: dict[int, dict[Call, Any]] = {}

    @contextmanager
    def of(self, batch: int) -> Iterator[None]:
        """Within this context the layer runs on the batch of this number."""
        outputs, calls = self._outputs.setdefault(batch, {}), Counter[nn.Module]()
        for module in self._modules:
            module.forward = partial(_replayed, module, module.forward, outputs, calls)
        try:
            yield
        finally:
            for module in self._modules:
                del module.forward

    def forget(self, batch: int) -> None:
        """Free the outputs of a batch that has passed the layer."""
        self._outputs.pop(batch, None)


def _is_linear(module: nn.Module) -> bool:
    return any(isinstance(part, nn.Linear) for part in module.modules())


def _replayed(
    module: nn.Module,
    forward: Callable[..., Any],
    outputs: dict[Call, Any],
    calls: Counter[nn.Module],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """The module's recorded output; the first time it runs, and what its parts gave is dropped."""
    call = module, calls[module]
    calls[module] += 1
    if call not in outputs:
        output = forward(*args, **kwargs)
        inside = set(module.modules()) - {module}
        for part in [key for key in outputs if key[0] in inside]:
            del outputs[part]
        outputs[call] = output
    return outputs[call]
