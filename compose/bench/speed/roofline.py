"""The machine's roofline: memory bandwidth bounds decoding, arithmetic bounds prefill."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

READ_BYTES, GEMM_SIZE = 1 << 28, 1024


def roofline() -> dict[str, float]:
    """Bytes read from memory (GB/s) and multiply-adds of a GEMM (GFLOP/s), best of a few tries."""
    data = torch.ones(READ_BYTES // 4)
    read = min(_seconds(data.sum) for _ in range(5))
    limits = {"memory_gb_per_s": READ_BYTES / read / 1e9}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        a = torch.ones(GEMM_SIZE, GEMM_SIZE, dtype=dtype)
        spent = min(_seconds(partial(torch.matmul, a, a)) for _ in range(3))
        limits[f"gemm_{name}_gflop_per_s"] = 2 * GEMM_SIZE**3 / spent / 1e9
    return limits


def _seconds(work: Callable[[], Tensor]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
