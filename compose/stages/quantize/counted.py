"""Progress of GPTQ, layer by layer: neither optimum nor gptqmodel reports it to a caller."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from compose.units import Progress

METHODS = ("GPTQ", "FOEM")
"""Classes of gptqmodel that quantize a layer; older versions have only the first."""


@contextmanager
def counted(progress: Progress, total: int, phase: str) -> Iterator[None]:
    """Report each of `total` linear layers that gptqmodel quantizes while the block runs.

    Both ways into gptqmodel end in the `quantize` method of GPTQ or FOEM, called once per layer,
    possibly from several threads. The method calls itself where a layer has to be quantized again;
    that counts once.
    """
    from gptqmodel import quantization

    lock, done = threading.Lock(), 0
    under_way = threading.local()

    def counting(original: Any) -> Any:
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

        return quantize

    progress(0, total, phase)
    methods = (vars(quantization).get(name) for name in METHODS)
    originals = {cls: cls.quantize for cls in methods if "quantize" in vars(cls or object)}
    for method, original in originals.items():
        method.quantize = counting(original)
    try:
        yield
    finally:
        for method, original in originals.items():
            method.quantize = original
