"""Whose kernels a packed model runs on: measured when it is loaded, a few calls for each shape.

A layer's own library may have a faster kernel for this processor than we do. One choice is made for
the whole model, since the native engine runs a pass whole or not at all.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from gateskip.quantization.packed_linear import Samples
from gateskip.runtime.native import Engine

CALLS = 7  # that time a kernel
CLEARLY = 1.5  # times as fast other kernels must be to be taken: noise must not choose
Times = dict[str, dict[str, float]]
"""Microseconds for one row by `ours` and by the library's `own` kernel, by kind and shape."""


def kernel_times(samples: Samples, engine: Engine | None) -> Times:
    """Time each pair of layers on one row; ours by the engine's kernel where it will run."""
    times: Times = {}
    for name, (ours, own) in samples.items():
        x = torch.randn(1, ours.in_features)
        run = ours if engine is None else engine.multiplier(ours)
        times[name] = {"ours": _microseconds(run, x), "own": _microseconds(own, x)}
    return times


def own_are_faster(times: Times) -> bool:
    """Whether the libraries' own kernels are clearly faster, one layer of each shape together."""
    ours, own = (sum(each[whose] for each in times.values()) for whose in ("ours", "own"))
    return ours > CLEARLY * own


def _microseconds(run: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """Median time of a few calls, the first one left out."""
    seconds = []
    with torch.inference_mode():
        for _ in range(CALLS + 1):
            begin = time.perf_counter()
            run(x)
            seconds.append(time.perf_counter() - begin)
    return round(1e6 * sorted(seconds[1:])[CALLS // 2], 1)
