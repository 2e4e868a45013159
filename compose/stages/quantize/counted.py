"""Progress of GPTQ, layer by layer: neither optimum nor gptqmodel reports it to a caller."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from compose.units import Progress


@contextmanager
def counted(progress: Progress, total: int, phase: str) -> Iterator[None]:
    """Report each of `total` linear layers that gptqmodel quantizes while the block runs.

    Both ways into gptqmodel end in `GPTQ.quantize`, once a layer, perhaps in several threads. It
    calls itself where a layer has to be quantized again, which counts once.
    """
    from gptqmodel.quantization.gptq import GPTQ

    original, lock = GPTQ.quantize, threading.Lock()
    done = 0
    under_way = threading.local()

    def quantize(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal done
        if getattr(under_way, "layer", None) is self:
            return original(self, *args, **kwargs)
        under_way.layer = self
        try:
            result = original(self, *args, **kwargs)
        finally:
            under_way.layer = None
        with lock:
            done += 1
            progress(min(done, total), total, phase)
        return result

    progress(0, total, phase)
    GPTQ.quantize = quantize
    try:
        yield
    finally:
        GPTQ.quantize = original
