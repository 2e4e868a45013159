"""In how many rows at a time a prompt's products are computed.

oneDNN compiles a bfloat16 product for each new size, for milliseconds, and keeps half a megabyte of
code; gates leave another number of tokens at every branch of every prompt. So gathered rows come in
few sizes where that holds, and in equal parts elsewhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

EVEN = 64  # gathered rows, and keys, come in multiples of this
TOGETHER = 1024  # tokens that enter a branch at once


def filled(kept: Tensor, even: int = EVEN) -> Tensor:
    """Indices [N] of gathered rows, the last one repeated until `even` divides their number."""
    missing = -len(kept) % even
    return torch.cat((kept, kept[-1:].expand(missing))) if missing else kept


def few_sizes(count: int) -> list[int]:
    """Sizes of the parts in which `count` tokens enter: TOGETHER or half of it but for the last,
    which is no larger than that half."""
    whole, rest = divmod(count, TOGETHER)
    half = TOGETHER // 2
    return [TOGETHER] * whole + ([half, rest - half] if rest > half else [rest])


def equal_sizes(count: int) -> list[int]:
    """As many equal parts as keep what lies between an MLP's products small."""
    parts = max(1, -(-count // (TOGETHER + TOGETHER // 2)))
    return [count // parts + (i < count % parts) for i in range(parts)]


def evened(count: int) -> int:
    """Keys to compute with for `count` in sight: a number out of few, at most an eighth more."""
    step = EVEN
    while 8 * step < count:
        step *= 2
    return -(-count // step) * step
