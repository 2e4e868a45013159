"""Role `probe`: try the libraries that stages need, for `gateskip doctor`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from compose.errors import ComposeError

NF4_ERROR = 0.2
"""Largest error of NF4 that passes, on weights from -1 to 1: half of its widest step is 0.15."""


def probe_libraries(report: Callable[[dict[str, Any]], None]) -> None:
    """Try each library, and report each before the next is tried: one may end the process.

    Reports have the keys `torch`, `threads`, `capability`, `gpu`; then `kernels`, with the `file`
    of the compiled kernels and the `choices` that were timed here, or the `error`; then
    `bitsandbytes`; then `gptqmodel`: each of the latter two has a `version`, or the `error` of the
    trial.
    """
    import torch

    report(
        {
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        }
    )
    report({"kernels": _kernels()})
    report({"bitsandbytes": _outcome(_try_bitsandbytes)})
    report({"gptqmodel": _outcome(_try_gptqmodel)})


def _kernels() -> dict[str, Any]:
    from gateskip.kernels import autotune, build

    if (error := build.problem()) is not None:
        return {"error": error}
    return {"file": build.build().name, "choices": len(autotune.choices())}


def _outcome(attempt: Callable[[], str]) -> dict[str, str]:
    try:
        return {"version": attempt()}
    except ComposeError:
        raise
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0]}


def _try_bitsandbytes() -> str:
    import bitsandbytes
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    device = "cuda" if torch.cuda.is_available() else "cpu"
    weights = torch.linspace(-1, 1, 64 * 64, device=device).reshape(64, 64)
    packed, state = quantize_4bit(weights, quant_type="nf4")
    error = float((dequantize_4bit(packed, state) - weights).abs().max())
    if error > NF4_ERROR:
        raise ValueError(f"NF4 gives wrong values (off by {error:.2f})")
    return str(bitsandbytes.__version__)


def _try_gptqmodel() -> str:
    from importlib import metadata

    import gptqmodel  # noqa: F401

    return metadata.version("gptqmodel")
