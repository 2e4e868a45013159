"""Products in bfloat16, in whichever type this processor multiplies faster.

Some processors that have the instructions multiply twice as fast in bfloat16 as in float32, others
half as fast, so it is measured, once a process.
"""

from __future__ import annotations

import timeit
from functools import cache, partial
from itertools import cycle
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

AT_ONCE = 8192  # rows of a weight that exist in float32: an LM head has many


@cache
def halves_pay() -> bool:
    """Whether a CPU's product of a layer's size is faster in bfloat16 than in float32."""
    able: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    if not any(able.get(name) for name in ("avx512_bf16", "amx_tile", "bf16")):
        return False
    return _seconds(torch.bfloat16) < _seconds(torch.float32)


def _seconds(kind: torch.dtype) -> float:
    x, weight = (torch.ones(n, 1024, dtype=kind) for n in (256, 1024))
    return min(timeit.repeat(partial(F.linear, x, weight), number=1))


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., in] times weight [out, in], plus bias [out], as x's type: what F.linear gives, by way
    of float32 where bfloat16 would take longer."""
    if x.dtype != torch.bfloat16 or x.device.type != "cpu" or halves_pay():
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    wide, biases = x.float(), [None] if bias is None else bias.float().split(AT_ONCE)
    parts = [
        F.linear(wide, rows.float(), own).to(x.dtype)
        for rows, own in zip(weight.split(AT_ONCE), cycle(biases))
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)
