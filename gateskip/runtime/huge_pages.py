"""Puts weights on huge pages: a token reads all weights, and with 4 KiB pages address translation
slows that down.

Linux moves memory in use onto pages of 2 MiB on request (`MADV_COLLAPSE`, since 6.1), with
unchanged addresses and contents. On other systems, and where it is forbidden, nothing happens.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # results name the setting without torch
    from torch import Tensor

HUGE = 2 << 20  # bytes of a huge page
COLLAPSE = 25  # MADV_COLLAPSE, which the mmap module does not name
_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@cache
def setting() -> str | None:
    """`always`, `madvise` or `never`, the setting of this system; None where it has none."""
    try:
        words = _SETTING.read_text(encoding="ascii").split()
    except OSError:
        return None
    return next((word.strip("[]") for word in words if word.startswith("[")), None)


def collapse(tensors: Iterable[Tensor]) -> int:
    """Move the memory of tensors onto huge pages where they fill at least half of one; returns the
    bytes moved.

    It is a request: memory that the system does not move stays where it is. Each call waits for all
    processors, so neighbouring pages go together, and one by one only where some of them cannot be
    moved.
    """
    madvise = _madvise()
    if madvise is None:
        return 0
    blocks = sorted(block for block, filled in _filled(tensors).items() if filled >= HUGE // 2)
    moved = 0
    for first, count in _runs(blocks):
        if madvise(first * HUGE, count * HUGE, COLLAPSE) == 0:
            moved += count
        else:
            alone = range(first, first + count)
            moved += sum(1 for block in alone if madvise(block * HUGE, HUGE, COLLAPSE) == 0)
    return HUGE * moved


def prefer(tensor: Tensor) -> None:
    """Ask for huge pages under memory that nothing was written to yet, as far as it fills them."""
    madvise = _madvise()
    begin, end = _span(tensor)
    first, last = -(-begin // HUGE) * HUGE, end // HUGE * HUGE
    if madvise is not None and first < last and tensor.device.type == "cpu":
        madvise(first, last - first, mmap.MADV_HUGEPAGE)


def _madvise() -> ctypes._NamedFuncPointer | None:
    if not sys.platform.startswith("linux") or setting() in (None, "never"):
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function


def _runs(numbers: list[int]) -> Iterator[tuple[int, int]]:
    """Of ascending numbers, those that follow each other: the first, and how many."""
    for _, pairs in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        run = [number for _, number in pairs]
        yield run[0], len(run)


def _filled(tensors: Iterable[Tensor]) -> Counter[int]:
    """Number of an aligned block of memory -> how many of its bytes belong to the tensors."""
    filled: Counter[int] = Counter()
    for begin, end in {_span(tensor) for tensor in tensors if tensor.device.type == "cpu"}:
        for block in range(begin // HUGE, -(-end // HUGE)):
            filled[block] += min(end, (block + 1) * HUGE) - max(begin, block * HUGE)
    return filled


def _span(tensor: Tensor) -> tuple[int, int]:
    begin = tensor.data_ptr()
    return begin, begin + tensor.numel() * tensor.element_size()
