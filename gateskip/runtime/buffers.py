"""Memory that calls use again: what the system gives anew it has to clear first, page by page."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


class Buffers:
    """Memory by name and type, as large as the largest that was asked for."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor of a shape, which the next one of that name and type lies over."""
        size, held = math.prod(shape), self._held.get((name, dtype))
        if held is None or len(held) < size:
            with torch.inference_mode(False):
                held = self._held[name, dtype] = torch.empty(size, dtype=dtype)
        return held[:size].view(*shape)
